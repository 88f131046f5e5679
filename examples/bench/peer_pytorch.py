"""One LoRA training step on the CPU, ours beside PyTorch + PEFT, in turns on the same machine.

    examples/bench/peer_pytorch.py [--rounds 3] [--steps 5] [--only ours,eager,compiled] [--batch 4] [--seq 512]

needs torch, transformers and peft (tests/requirements_torch.txt), a built build/unsloth-lua, and a C++ compiler for
torch.compile. The shape is SmolLM2-135M with random weights: bfloat16 weights, LoRA r = 16 on the seven modules of a block,
4 rows of 512 tokens (--batch, --seq), every label counted, AdamW, two threads, no checkpointing, gradients clipped to norm 1.
The peer's adapters are in bfloat16 by default (--adapters float32 is PEFT's own default, run under autocast). On a processor
without AVX512_BF16 PyTorch multiplies bfloat16 a number at a time: --weights float32 gives it its best there.
OPENBLAS_* is unset for both. Prints tokens/s of each round, medians, and the ratio to the better peer.
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

for name in [name for name in os.environ if name.startswith("OPENBLAS_")]:
    del os.environ[name]

ROOT = pathlib.Path(__file__).resolve().parents[2]
RANK = 16
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_ours(args):
    """Returns tokens/s of `--steps` updates, as the program reports them."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "bench.json")
        command = [args.program, "bench", "--shape", "smollm2-135m", "--method", "lora", "--device", "cpu", "--batch", args.batch,
                   "--seq", args.seq, "--rank", RANK, "--recompute", "none", "--steps", args.steps, "--json", out]
        # Otherwise the program computes in what is best for the machine; the random weights are stored in that type.
        command += ["--dtype", "float32"] if args.weights == "float32" else []
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        with open(out) as f:
            return json.load(f)["tokens_per_second"]


class Peer:
    def __init__(self, args, compiled):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(args.threads)
        torch.manual_seed(3407)
        config = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            head_dim=64, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, use_cache=False,
            attn_implementation="sdpa",
        )
        dtype = getattr(torch, args.weights)
        model = LlamaForCausalLM(config).to(dtype)
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, task_type="CAUSAL_LM")
        self.autocast = dtype == torch.bfloat16 and args.adapters == "float32"
        model = get_peft_model(model, lora, autocast_adapter_dtype=self.autocast)
        model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4)
        self.ids = torch.randint(0, config.vocab_size, (args.batch, args.seq))
        self.model = torch.compile(model) if compiled else model
        self.torch = torch
        self.step()  # compiles, and makes the optimiser's state
        self.step()

    def step(self):
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()

    def run(self, args):
        seconds = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return args.batch * args.seq / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=ROOT / "build" / "unsloth-lua")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--weights", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", default="ours,eager,compiled")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    runs = {}
    for name in args.only.split(","):
        if name == "ours":
            runs[name] = run_ours
            continue
        begin = time.perf_counter()
        runs[name] = Peer(args, name == "compiled").run
        print(f"{name}: ready after {time.perf_counter() - begin:.0f} s", file=sys.stderr)

    rates = {name: [] for name in runs}
    for turn in range(args.rounds):
        for name, run in runs.items():
            rates[name].append(run(args))
            print(f"round {turn + 1}: {name:9s}{rates[name][-1]:8.0f} tokens/s", flush=True)

    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"median:  {name:9s}{value:8.0f} tokens/s")
    peers = {name: value for name, value in medians.items() if name != "ours"}
    ratio = None
    if peers and "ours" in medians:
        best = max(peers, key=peers.get)
        ratio = medians["ours"] / peers[best]
        print(f"ours is {ratio:.2f} times {best}")
    if args.json:
        figures = {"rates": rates, "medians": medians, "ratio": ratio, "threads": args.threads, "batch": args.batch, "seq": args.seq,
                   "weights": args.weights, "adapters": args.adapters}
        with open(args.json, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    main()
