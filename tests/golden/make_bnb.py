#!/usr/bin/env python3
"""Makes the golden cases bnb_* of this folder with transformers, bitsandbytes and PEFT on the CPU: checkpoints that bitsandbytes
quantised, and what a float32 model of their dequantised weights answers.

    make_bnb.py [CASE ...]        wants adapter_models/biased, which make_adapters.py makes
"""
import json
import shutil
import sys
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
BASE = HERE / "adapter_models" / "biased"
SKIP = ["lm_head", "layers.1.mlp.up_proj"]

CASES = {
    "bnb_nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=SKIP),
    "bnb_fp4_blocks_128": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "bnb_nf4_blocks_128": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb_int8": dict(load_in_8bit=True),
}


def requantise(folder, kind, nested, blocksize):
    """transformers has no option for the length of blocks, the format has."""
    tensors = load_file(folder / "model.safetensors")
    plain = load_file(BASE / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight.absmax")]:
        name = name[: -len(".absmax")]
        for key in [k for k in tensors if k.startswith(name + ".")]:
            del tensors[key]
        data, state = bnb.functional.quantize_4bit(plain[name].float(), blocksize=blocksize, compress_statistics=nested, quant_type=kind)
        tensors[name] = data
        tensors.update({f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def dequantised(folder):
    """A float32 model of the numbers that the checkpoint stands for."""
    tensors = load_file(folder / "model.safetensors")
    out = {}
    for name, t in tensors.items():
        if f"{name}.absmax" in tensors:
            parts = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + ".")}
            state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            out[name] = bnb.functional.dequantize_4bit(t, state)
        elif t.dtype == torch.int8:
            out[name] = bnb.functional.int8_vectorwise_dequant(t, tensors[name.replace(".weight", ".SCB")])
        elif name.endswith((".weight", ".bias")):
            out[name] = t.float()
    config = transformers.AutoConfig.from_pretrained(BASE)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(out)
    return model


def make(name):
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    options = transformers.BitsAndBytesConfig(**CASES[name])
    kind = torch.float16 if "int8" in name else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, quantization_config=options, dtype=kind, device_map="cpu")
    model.save_pretrained(out / "model")
    if "blocks_128" in name:
        requantise(out / "model", CASES[name]["bnb_4bit_quant_type"], CASES[name]["bnb_4bit_use_double_quant"], 128)
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 61, (1, 2, 24), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[..., :4] = -100
    golden = {"input_ids": ids.int(), "attention_mask": mask.int(), "labels": labels.int()}
    plain = dequantised(out / "model")
    with torch.no_grad():
        golden["base.logits"] = plain(input_ids=ids[0]).logits
    torch.manual_seed(23)
    dora = "nf4" in name
    lora = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], use_dora=dora,
                                                      task_type="CAUSAL_LM", init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = None  # a path of the machine that made it
    lora.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    logits = lora(input_ids=ids[0]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 61), labels[0][:, 1:].reshape(-1), ignore_index=-100)
    loss.backward()
    golden["lora.logits"], golden["lora.loss"] = logits.detach(), loss.detach().reshape(1)
    golden.update({f"lora.grad.{n}": p.grad.clone() for n, p in lora.named_parameters() if p.requires_grad})
    save_file({k: v.contiguous() for k, v in golden.items()}, out / "golden.safetensors")
    meta = {"case": name, "transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__,
            "bitsandbytes": bnb.__version__, "hp": {"lr": 0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
                                                    "warmup_steps": 0, "steps": 0}, "attn": "eager", "dtype": "float32"}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


for case in sys.argv[1:] or CASES:
    make(case)
    print(case)
