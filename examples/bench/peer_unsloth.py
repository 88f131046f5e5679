"""4-bit LoRA training of the Llama-3-8B shape by TRL and by Unsloth on one GPU, on the rows that `unsloth-lua bench` trains on.

    examples/bench/peer_unsloth.py [--small] [--batch 2] [--seq 2048] [--steps 10] [--packages FOLDER] [--only NAME,NAME]

needs torch, transformers, peft, accelerate, bitsandbytes, trl, datasets below 5 and what these ask for; for Unsloth also unsloth,
unsloth_zoo, torchao above 0.16, xformers, cut_cross_entropy, tyro, msgspec, pydantic; liger_kernel for the case that names it. What is
not installed may lie as unpacked wheels in a folder: --packages puts it behind the installed packages, so that those win. No network.

A checkpoint of random weights is written once (NF4 of bitsandbytes with double quantisation; 5.7 GB for the 8B shape) with a small
tokenizer, and every case loads it in a process of its own: LoRA r = 16 on the seven modules of a block, rows of ready token ids, no
packing asked for, 8-bit AdamW, every label counted, gradients clipped to norm 1. A step lasts from the end of one update to the end of
the next, the GPU waited for. Prints each case's median rate, the driver's memory at its peak and the seconds from launch to the end
of the first update; a case that fails says why in a line, and the next one runs. --small: the shape of Llama-3.2-1B; --shape tiny:
checks this script, without a GPU too.
"""
import argparse
import importlib.metadata
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback

START = time.perf_counter()
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {  # hidden, inner, layers, heads, heads of keys, vocabulary, one table for embedding and head
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "tiny": (256, 512, 2, 4, 2, 1024, False),
}
CASES = {  # library, checkpointed, Liger's kernels; the last ones fall away where time runs out
    "unsloth-checkpointed": ("unsloth", True, False),
    "trl": ("trl", False, False),
    "unsloth": ("unsloth", False, False),
    "trl-checkpointed": ("trl", True, False),
    "trl-liger": ("trl", False, True),
}
SHOWN = ["unsloth", "unsloth_zoo", "trl", "liger_kernel", "bitsandbytes", "peft", "transformers", "datasets", "xformers", "torchao",
         "torch", "triton"]


def random_rows(count, length, vocab, seed=3407):
    """The rows of `unsloth-lua bench`, from the same generator."""
    state, rows = seed, []
    for _ in range(count):
        row = []
        for _ in range(length):
            state = (state * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
            row.append(int((state >> 11) / (1 << 52) * vocab))
        rows.append(row)
    return rows


def write_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2],
                            model_max_length=8192).save_pretrained(folder)


def write_checkpoint(args):
    """A folder as bitsandbytes' checkpoints are: every product of the layers in NF4, the rest in bfloat16."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, LlamaConfig

    hidden, inner, layers, heads, kv_heads, vocab, tied = SHAPES[args.shape]
    kv = hidden // heads * kv_heads
    products = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.shape != "tiny":
        raise RuntimeError("PyTorch sees no CUDA GPU here; only --shape tiny runs without one")
    torch.manual_seed(3407)
    tensors = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}

    def drawn(rows, columns):
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02

    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        tensors[name] = drawn(vocab, hidden).cpu()
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            tensors[f"{at}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, shape in products.items():
            packed, state = quantize_4bit(drawn(*shape), quant_type="nf4", compress_statistics=True)
            tensors[f"{at}{name}.weight"] = packed.cpu()
            for part, value in state.as_dict(packed=True).items():
                tensors[f"{at}{name}.weight.{part}"] = value.cpu()
    save_file(tensors, os.path.join(args.model, "model.safetensors"), metadata={"format": "pt"})
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=8192, rope_theta=500000.0,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                               bnb_4bit_compute_dtype="bfloat16").to_dict(),
    ).save_pretrained(args.model)
    write_tokenizer(args.model)
    return {}


def watch_memory(peak):
    """The most that the driver said was in use, looked at twenty times a second."""
    import torch

    while torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak[0] = max(peak[0], total - free)
        time.sleep(0.05)


def load_trl(args, checkpointed):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map={"": where}, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=MODULES, task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(args.model), {"peft_config": lora}


def load_unsloth(args, checkpointed):
    from unsloth import FastLanguageModel  # before trl and transformers, which it changes

    how = "unsloth" if checkpointed else False
    model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=args.seq, load_in_4bit=True,
                                                         use_gradient_checkpointing=how)
    model = FastLanguageModel.get_peft_model(model, r=args.rank, lora_alpha=args.rank, lora_dropout=0, bias="none",
                                             target_modules=MODULES, use_gradient_checkpointing=how, random_state=3407)
    return model, tokenizer, {}


def train(args, library, checkpointed, liger):
    model, tokenizer, more = (load_unsloth if library == "unsloth" else load_trl)(args, checkpointed)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda.is_available()
    peak, ends, norms = [0], [], []
    threading.Thread(target=watch_memory, args=(peak,), daemon=True).start()

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step + 1 == state.max_steps:
                norms.extend(float(p.grad.norm()) for p in trainer.model.parameters() if p.grad is not None)

        def on_step_end(self, args, state, control, **_):
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    updates = args.warmup + args.steps
    options = {"use_liger_kernel": True} if liger else {}
    if library == "trl" or not checkpointed:  # Unsloth's own kind was chosen with the model
        options["gradient_checkpointing"] = checkpointed
    config = SFTConfig(
        output_dir=os.path.join(args.work, "out"), per_device_train_batch_size=args.batch, gradient_accumulation_steps=1, max_steps=updates,
        learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_8bit" if gpu else "adamw_torch", bf16=True, use_cpu=not gpu,
        max_grad_norm=1.0, max_length=args.seq, packing=False, report_to="none", save_strategy="no", logging_steps=updates, seed=3407,
        **options,
    )
    rows = random_rows(args.batch * updates, args.seq, SHAPES[args.shape][5])
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer,
                         callbacks=[Watch()], **more)
    trainer.train()
    if len(ends) != updates:
        raise RuntimeError(f"{len(ends)} updates were made instead of {updates}")
    if not sum(norms) > 0 or sum(norms) == float("inf"):
        raise RuntimeError("the gradient norm is not a number above zero: it trained nothing")
    seconds = [b - a for a, b in zip(ends[args.warmup - 1:], ends[args.warmup:])]
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"rate": args.batch * args.seq / statistics.median(seconds), "memory": peak[0], "first": ends[0] - START,
            "loss": loss[-1] if loss else None}


def versions():
    found = []
    for name in SHOWN:
        if name in sys.modules:
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                pass
    return ", ".join(found)


def one_line(error):
    at = traceback.extract_tb(error.__traceback__)[-1]
    parts = pathlib.Path(at.filename).parts
    place = "/".join(parts[-3:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place}:{at.lineno}, {at.name})"


def child(args):
    if args.packages:
        sys.path.append(args.packages)
    try:
        result = write_checkpoint(args) if args.child == "checkpoint" else train(args, *CASES[args.child])
    except BaseException as error:  # SystemExit too: a library that leaves is a failure to be told
        traceback.print_exc()
        result = {"error": one_line(error)}
    result["versions"] = versions()
    with open(os.path.join(args.work, args.child + ".json"), "w") as f:
        json.dump(result, f)
    sys.stdout.flush()
    os._exit(0)  # no library's farewell may hold the card


def run_child(name, args, limit):
    """What the case found, or {"error": a line}. Its output goes to a log."""
    work = os.path.join(args.work, name)
    os.makedirs(work, exist_ok=True)
    environment = dict(
        os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1",
        HF_HOME=os.path.join(args.work, "home"), TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1",
    )
    command = [sys.executable, os.path.abspath(__file__), "--child", name, "--shape", args.shape, "--model", args.model, "--work", work]
    for option in ["batch", "seq", "rank", "steps", "warmup"]:
        command += ["--" + option, str(getattr(args, option))]
    if args.packages:
        command += ["--packages", args.packages]
    log = os.path.join(args.logs or work, name + ".log")
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, cwd=work, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too: the next case has the machine to itself
        except ProcessLookupError:
            pass
        process.wait()
    try:
        with open(os.path.join(work, name + ".json")) as f:
            return json.load(f)
    except FileNotFoundError:
        with open(log, errors="replace") as f:
            last = [line.strip() for line in f if line.strip()][-1:]
        what = f"not done after {limit:.0f} s" if status is None else f"ended with status {status}"
        return {"error": f"{what}; its last line: {last[0][:300] if last else 'none'}", "versions": ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8b")
    parser.add_argument("--small", action="store_const", dest="shape", const="llama3.2-1b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--packages", type=os.path.abspath, help="a folder of unpacked wheels")
    parser.add_argument("--only", help="these cases of " + ", ".join(CASES))
    parser.add_argument("--seconds", type=float, default=200, help="for all of it")
    parser.add_argument("--logs", type=os.path.abspath, help="a folder that keeps what each case printed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warmup < 1:
        parser.error("--warmup: the first update has no beginning to be measured from; give 1 or more")
    if args.child:
        child(args)

    names = args.only.split(",") if args.only else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--only: {unknown[0]} is no case; they are {', '.join(CASES)}")
    if args.logs:
        os.makedirs(args.logs, exist_ok=True)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        args.work, args.model = folder, os.path.join(folder, "checkpoint-4bit")
        os.makedirs(args.model)
        made = run_child("checkpoint", args, args.seconds)
        if "error" in made:
            sys.exit(f"checkpoint: {made['error']}")
        print(f"checkpoint: {time.perf_counter() - START:.1f} s", flush=True)
        for i, name in enumerate(names):
            left = args.seconds - (time.perf_counter() - START)
            if left < 15:
                result = {"error": "no time was left for it", "versions": ""}
            else:  # the cases after this one keep 25 s each where that leaves this one 45
                result = run_child(name, args, min(left, max(45, left - 25 * (len(names) - i - 1))))
            if "error" in result:
                print(f"{name}: {result['error']}", flush=True)
            table.append((name, result))
    print("name | versions | tokens/s | GiB | first step s | loss")
    for name, r in table:
        if "error" in r:
            print(f"{name} | {r['versions']} | failed | - | - | -")
        else:
            loss = "-" if r["loss"] is None else f"{r['loss']:.4f}"
            print(f"{name} | {r['versions']} | {r['rate']:.0f} | {r['memory'] / 2**30:.2f} | {r['first']:.1f} | {loss}")


if __name__ == "__main__":
    main()
