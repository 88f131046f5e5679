#!/usr/bin/env python3
"""Makes the golden case deepseek_v3_fp8 of this folder with torch and transformers on the CPU: the model of deepseek_v3 stored as
DeepSeek V3 is published (8-bit floats, a scale for each block of a weight), and what a float32 model of the bfloat16 numbers answers that
DeepSeek's own converter makes of it.

    make_fp8.py        wants deepseek_v3, which make_golden.py makes
"""
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
BASE, OUT, BLOCK = HERE / "deepseek_v3" / "model", HERE / "deepseek_v3_fp8", (16, 12)
PLAIN = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")


def spread(scales, shape):
    """A block's scale at each of its numbers."""
    return scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: shape[0], : shape[1]]


def quantise(w):
    rows, cols = (-(-n // b) for n, b in zip(w.shape, BLOCK))
    padded = torch.zeros(rows * BLOCK[0], cols * BLOCK[1])
    padded[: w.shape[0], : w.shape[1]] = w
    scales = padded.view(rows, BLOCK[0], cols, BLOCK[1]).abs().amax((1, 3)).clamp(min=1e-12) / 448
    return (w / spread(scales, w.shape)).to(torch.float8_e4m3fn), scales


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(BASE, OUT / "model")
    stored, numbers = {}, {}
    for name, w in load_file(BASE / "model.safetensors").items():
        numbers[name] = stored[name] = w
        if w.ndim != 2 or any(p in name for p in PLAIN):
            continue
        codes, scales = quantise(w.float())
        stored[name], stored[name + "_scale_inv"] = codes, scales
        numbers[name] = (codes.float() * spread(scales, w.shape)).bfloat16()
    save_file({k: v.contiguous() for k, v in stored.items()}, OUT / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((BASE / "config.json").read_text())
    config["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (OUT / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    plain = OUT / "plain"
    shutil.copytree(BASE, plain)
    save_file({k: v.float().contiguous() for k, v in numbers.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    shutil.rmtree(plain)
    ids = torch.randint(3, 60, (1, 2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(input_ids=ids[0]).logits
    golden = {"input_ids": ids.int(), "attention_mask": torch.ones_like(ids).int(), "labels": ids.int(), "base.logits": logits.contiguous()}
    save_file(golden, OUT / "golden.safetensors")
    meta = {"case": "deepseek_v3_fp8", "transformers": transformers.__version__, "torch": torch.__version__,
            "hp": {"lr": 0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "warmup_steps": 0, "steps": 0},
            "attn": "eager", "dtype": "float32"}
    (OUT / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


main()
