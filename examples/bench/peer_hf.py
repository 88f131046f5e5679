"""LoRA training of the Llama-3-8B shape on one GPU, ours beside Hugging Face + PEFT, one after the other on the same card.

    examples/bench/peer_hf.py [--batch 2] [--seq 2048] [--steps 20] [--checkpointed] [--eager] [--four-bit] [--liger]
                              [-- MORE OPTIONS OF OURS]

needs torch, transformers and peft, and a program built with CUDA. Random weights in bfloat16, LoRA r = 16 on the seven modules
of a block, adapters in bfloat16, each decoder layer compiled by torch.compile (the quickest of the peers that were tried),
every label counted, AdamW (fused), gradients clipped to norm 1. --four-bit: bitsandbytes' NF4 with double quantisation (its
products are not compiled). --liger: Liger's kernels and its fused head and loss. Ours: 4-bit weights (--method qlora; --method lora to
compare like with like). Prints the median rate, the driver's memory, the seconds from launch to the first update, the ratio.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

START = time.perf_counter()
ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_ours(args):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "bench.json")
        command = [args.program, "bench", "--shape", "llama3-8b", "--device", "cuda", "--method", args.method, "--batch", args.batch,
                   "--seq", args.seq, "--rank", args.rank, "--steps", args.steps, "--json", out, *args.more]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        with open(out) as f:
            figures = json.load(f)
    return figures["tokens_per_second"], figures["peak_memory"], figures["first_update_seconds"]


def quantise(model):
    """Every product of the layers becomes bitsandbytes', as its loader makes them."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for parent in [layer.self_attn, layer.mlp]:
            for name, linear in list(parent.named_children()):
                if linear.__class__.__name__ != "Linear":
                    continue
                four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
                                         compress_statistics=True, quant_type="nf4", device="meta")
                weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
                four.weight = weight.to(linear.weight.device)
                setattr(parent, name, four)
    model.is_loaded_in_4bit = True
    import torch

    torch.cuda.empty_cache()


def run_peer(args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3407)
    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0, use_cache=False, attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if args.four_bit:
        quantise(model)
    model.train()
    if args.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if not args.eager and not args.four_bit:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), device="cuda")
    seconds, first = [], None
    for step in range(args.steps + 3):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        first = first or time.perf_counter() - START
        if step >= 3:
            seconds.append(time.perf_counter() - begin)
    if not float(norm) > 0:
        sys.exit("the peer's gradient norm is not above zero: it trained nothing")
    free, total = torch.cuda.mem_get_info()
    return args.batch * args.seq / statistics.median(seconds), total - free, first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=ROOT / "build" / "unsloth-lua")
    parser.add_argument("--method", choices=["qlora", "lora"], default="qlora")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()

    ours = run_ours(args)
    theirs = run_peer(args)
    for name, (rate, memory, first) in [("ours", ours), ("peer", theirs)]:
        print(f"{name}: {rate:8.0f} tokens/s  {memory / 2**30:6.2f} GiB  first update after {first:5.1f} s")
    print(f"ours is {ours[0] / theirs[0]:.3f} times as quick, in {ours[1] / theirs[1]:.2f} of the memory")


if __name__ == "__main__":
    main()
