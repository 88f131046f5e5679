#!/usr/bin/env python3
"""Makes the golden cases adapter_* of this folder with transformers and PEFT, float32 on the CPU, eager attention.

    make_adapters.py [CASE ...]

As make_golden.py's, but of adapters alone: each case is a folder with adapter/ (PEFT), golden.safetensors and meta.json, which
names the model, one of adapter_models/. tests/golden.lua computes the same tensors.
"""
import json
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH, LENGTH, WARMUP, LR = 4, 2, 24, 1, 2e-3

BASE = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.08,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
MODELS = {"biased": dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
          "tied": dict(tie_word_embeddings=True)}

CASES = {
    "adapter_dora": ("biased", dict(target_modules=SEVEN, use_dora=True, use_rslora=True, rank_pattern={"down_proj": 6, "layers.1.self_attn.[qk]_proj": 3},
                                    alpha_pattern={"v_proj": 5, "layers.0.mlp.up_proj": 20})),
    "adapter_dora_head": ("biased", dict(target_modules=["q_proj", "o_proj", "lm_head"], use_dora=True, bias="lora_only")),
    "adapter_bias": ("biased", dict(target_modules=["v_proj", "down_proj"], layers_to_transform=[1], bias="all")),
    "adapter_embeddings": ("biased", dict(target_modules=["embed_tokens", "lm_head", "k_proj"])),
    "adapter_saved": ("tied", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "adapter_saved_tied": ("tied", dict(target_modules=SEVEN, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "adapter_saved_embed": ("tied", dict(target_modules=["gate_proj"], modules_to_save=["embed_tokens", "model.norm"])),
}
EMBEDDING_LR = {"adapter_saved": 5e-4}


def build(name):
    config = transformers.LlamaConfig(**{**BASE, **MODELS[name]})
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():  # norms and biases that are all ones and zeros would hide mistakes
        for key, p in model.named_parameters():
            if "norm" in key:
                p.add_(0.1 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.add_(0.05 * torch.randn_like(p))
    return model


def batches(vocab):
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocab, (STEPS + 1, BATCH, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[..., :4] = -100
    for k in range(STEPS + 1):  # the second row is shorter, padded at the right
        n = LENGTH - 3 - k
        ids[k, 1, n:], mask[k, 1, n:], labels[k, 1, n:] = 0, 0, -100
    return ids, mask, labels


def loss_of(model, ids, mask, labels):
    logits = model(input_ids=ids, attention_mask=mask).logits
    target = labels[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target, ignore_index=-100), logits


def train(model, data, params, lr, embedding_lr):
    """Unsloth's groups: trained copies have their own rate. Biases and norms do not decay, as in transformers."""
    saved = [(n, p) for n, p in params if "modules_to_save" in n]
    rest = [(n, p) for n, p in params if "modules_to_save" not in n]
    groups = []
    for items, rate in ((rest, lr), (saved, embedding_lr or lr)):
        for decays in (True, False):
            chosen = [p for n, p in items if (not n.endswith("bias") and "norm" not in n) == decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": 0.01 if decays else 0.0, "base": rate})
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for s in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * (s / WARMUP if s < WARMUP else (STEPS - s) / (STEPS - WARMUP))
        optimizer.zero_grad()
        loss, _ = loss_of(model, *(x[s + 1] for x in data))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in params], 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    return torch.tensor(losses), torch.tensor(norms)


def make(name):
    base, extra = CASES[name]
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    data = batches(BASE["vocab_size"])
    golden = {"input_ids": data[0].int(), "attention_mask": data[1].int(), "labels": data[2].int()}
    torch.manual_seed(23)
    lora = peft.get_peft_model(build(base), peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights=False,
                                                            **extra))
    params = [(n, p) for n, p in lora.named_parameters() if p.requires_grad]
    with torch.no_grad():  # magnitudes that are the rows' own lengths, and copies that are the base's, would hide mistakes too
        for n, p in params:
            if "lora_embedding" in n:
                p.mul_(0.1)
            elif "magnitude" in n:
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif "lora_" not in n:
                p.add_(0.02 * torch.randn_like(p))
    lora.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    loss, logits = loss_of(lora, *(x[0] for x in data))
    loss.backward()
    golden["lora.logits"], golden["lora.loss"] = logits.detach(), loss.detach().reshape(1)
    golden.update({f"lora.grad.{n}": p.grad.clone() for n, p in params})
    rate = EMBEDDING_LR.get(name)
    golden["lora.losses"], golden["lora.grad_norms"] = train(lora, data, params, LR, rate)
    golden.update({f"lora.final.{n.replace('.default', '')}": p.detach().clone() for n, p in params})
    with torch.no_grad():
        golden["merged.final.logits"] = loss_of(lora, *(x[0] for x in data))[1]
    save_file({k: v.contiguous() for k, v in golden.items()}, out / "golden.safetensors")
    adam = dict(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01, max_grad_norm=1.0, warmup_steps=WARMUP)
    meta = {"case": name, "model": f"../adapter_models/{base}", "transformers": transformers.__version__, "torch": torch.__version__,
            "peft": peft.__version__, "hp": {"lr": LR, "embedding_lr": rate or 0, **adam, "steps": STEPS, "schedule": "linear", "accum": 1},
            "lora": {"r": 4, "lora_alpha": 8, **extra}, "attn": "eager", "dtype": "float32"}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


for model in MODELS:
    build(model).save_pretrained(HERE / "adapter_models" / model)
for case in sys.argv[1:] or CASES:
    make(case)
    print(case)
