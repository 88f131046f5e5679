#!/usr/bin/env python3
"""Makes the golden cases of this folder with transformers and PEFT, float32 on the CPU, eager attention.

    make_golden.py [CASE ...]

Each case is a folder: model/ (config.json, model.safetensors), adapter/ (PEFT), golden.safetensors, meta.json. Versions are
written into meta.json. tests/golden.lua computes the same tensors and prints how far they lie apart.
"""
import copy
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
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
BATCH, WARMUP, LR, FULL_LR = 2, 2, 2e-3, 5e-4

BASE = dict(vocab_size=131, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.08,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, use_cache=False)


SMALL = dict(vocab_size=67, hidden_size=20, intermediate_size=26, num_attention_heads=2, num_key_value_heads=1)


def rope(**kw):
    return {"rope_parameters": {"rope_theta": 10000.0, **kw}}


def longrope(pairs, original, **kw):
    return dict(original_max_position_embeddings=original,
                **rope(rope_type="longrope", short_factor=[1 + 0.1 * i for i in range(pairs)],
                       long_factor=[1.5 + 0.7 * i for i in range(pairs)], **kw))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Mixtures are kept smaller: they have many tensors.
SPARSE = dict(vocab_size=67, hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=12)

LATENT = dict({k: v for k, v in SPARSE.items() if k != "head_dim"}, num_key_value_heads=2, kv_lora_rank=12,
              qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=12)

# What make() and tests/golden.lua do differently for a case: its sizes, whether the second row is shorter, config.json in the spelling
# of transformers 4 (with these fields changed), greedy tokens with a cache, what the model is opened with.
USUAL = dict(steps=6, full_steps=4, length=40, rank=4, alpha=8, pad=True, old=None, cached=False, open={})
QUICK = dict(USUAL, steps=3, full_steps=2, length=28, rank=2, alpha=2)
SHORT = dict(USUAL, length=24)
HOW = {
    "llama_dynamic": dict(QUICK, pad=False, cached=True, open={"max_seq_length": 28}),
    "llama_beyond": dict(QUICK, open={"max_seq_length": 28, "rope_scaling": '{"rope_type": "default"}'}),
    "mistral_head_dim": QUICK,
    "phi3_long": QUICK,
    "phi3_short": dict(QUICK, old=lambda c: c["rope_scaling"].update(type="su")),
    "phi3_window": QUICK,
    "qwen2_window": dict(QUICK, old=lambda c: c.pop("layer_types")),
    "gemma2_window": dict(QUICK, old=lambda c: c.pop("layer_types")),
    "gemma3_window": QUICK,
    "qwen2_moe": SHORT,
    "qwen3_moe_experts": SHORT,
    "mixtral_window": SHORT,
    "deepseek_v2_groups": SHORT,
    "deepseek_v3": SHORT,
}

# kind, changes to the config, and to the adapter where it is not on all seven
CASES = {
    # Rows of 28 tokens, and the model was trained for 20.
    "llama_dynamic": ("llama", dict(SMALL, max_position_embeddings=20, **rope(rope_type="dynamic", factor=2.0))),
    "llama_beyond": ("llama", dict(SMALL, max_position_embeddings=20, **rope(rope_type="default"))),
    "mistral_head_dim": ("mistral", dict(SMALL, head_dim=14, sliding_window=None, **rope(rope_type="default"))),
    # Greedy tokens begin on the short side of 16 and end on the long one.
    "phi3_long": ("phi3", dict(SMALL, hidden_size=24, **longrope(3, 16, partial_rotary_factor=0.5, attention_factor=1.25))),
    "phi3_short": ("phi3", dict(SMALL, hidden_size=16, **longrope(3, 32, partial_rotary_factor=0.75))),
    "phi3_window": ("phi3", dict(SMALL, sliding_window=9, tie_word_embeddings=True, **rope(rope_type="default"))),
    "qwen2_window": ("qwen2", dict(SMALL, hidden_size=16, num_hidden_layers=3, use_sliding_window=True, sliding_window=9,
                                   max_window_layers=1, tie_word_embeddings=True, **rope(rope_type="default"))),
    "gemma2_window": ("gemma2", dict(SMALL, hidden_size=15, num_attention_heads=3, head_dim=6, num_hidden_layers=3, sliding_window=7,
                                     query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                                     tie_word_embeddings=True, **rope(rope_type="default"))),
    "gemma3_window": ("gemma3", dict(SMALL, hidden_size=15, num_attention_heads=3, head_dim=6, num_hidden_layers=3, sliding_window=7,
                                     query_pre_attn_scalar=5, tie_word_embeddings=True,
                                     layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                                     rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                                                      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})),
    "llama_yarn": ("llama", dict(rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "llama_linear_bias": ("llama", dict(attention_bias=True, mlp_bias=True, **rope(rope_type="linear", factor=2.0))),
    "llama_odd": ("llama", dict(vocab_size=317, hidden_size=36, num_attention_heads=3, num_key_value_heads=1, head_dim=10,
                                intermediate_size=45, tie_word_embeddings=True, **rope(rope_type="default"))),
    "qwen2_moe": ("qwen2_moe", dict(SPARSE, num_hidden_layers=3, mlp_only_layers=[1], num_experts=4, num_experts_per_tok=2,
                                    moe_intermediate_size=16, shared_expert_intermediate_size=20, norm_topk_prob=False,
                                    **rope(rope_type="default")),
                  dict(target_modules="all-linear")),
    "qwen3_moe_experts": ("qwen3_moe", dict(SPARSE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16,
                                            norm_topk_prob=True, decoder_sparse_step=2,
                                            output_router_logits=True, router_aux_loss_coef=0.5, **rope(rope_type="default")),
                          dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    "mixtral_window": ("mixtral", dict(SPARSE, num_local_experts=3, num_experts_per_tok=2, sliding_window=7,
                                       **rope(rope_type="default")),
                       dict(target_modules=["k_proj", "o_proj"], target_parameters=EXPERTS)),
    "deepseek_v2_groups": ("deepseek_v2", dict(LATENT, q_lora_rank=10, n_routed_experts=6, n_group=3, topk_group=2,
                                               topk_method="group_limited_greedy", num_experts_per_tok=3, n_shared_experts=2,
                                               first_k_dense_replace=0, routed_scaling_factor=1.7, **rope(rope_type="default")),
                           dict(target_modules=["q_a_proj", "q_b_proj", "kv_b_proj", "down_proj"])),
    "deepseek_v3": ("deepseek_v3", dict(LATENT, q_lora_rank=10, n_routed_experts=8, n_group=4, topk_group=2,
                                        num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1,
                                        routed_scaling_factor=2.5, norm_topk_prob=True,
                                        **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.9,
                                               mscale_all_dim=0.7)),
                    dict(target_modules="all-linear")),
    "mistral_window": ("mistral", dict(sliding_window=9, **rope(rope_type="default"))),
}


def build(kind, extra):
    config_class, model_class = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                                 "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
                                 "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
                                 "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
                                 "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
                                 "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
                                 "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
                                 "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
                                 "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
                                 "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
                                 "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM)}[kind]
    config = config_class(**copy.deepcopy({**BASE, **extra}))
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = model_class(config).float()
    with torch.no_grad():  # norms and biases that are all ones and zeros would hide mistakes
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.add_(0.05 * torch.randn_like(p))
        for name, p in model.named_buffers():
            if "correction_bias" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batches(vocab, how):
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocab, (how["steps"] + 1, BATCH, how["length"]), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[..., :4] = -100
    for k in range(how["steps"] + 1 if how["pad"] else 0):  # the second row is shorter, padded at the right
        n = how["length"] - 5 - k
        ids[k, 1, n:], mask[k, 1, n:], labels[k, 1, n:] = 0, 0, -100
    return ids, mask, labels


def loss_of(model, ids, mask, labels):
    out = model(input_ids=ids, attention_mask=mask)
    logits, target = out.logits, labels[:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target, ignore_index=-100)
    if getattr(out, "aux_loss", None) is not None:  # output_router_logits
        loss = loss + model.config.router_aux_loss_coef * out.aux_loss
    return loss, logits


def train(model, data, params, decay, lr, steps):
    groups = [{"params": [p for n, p in params if decay(p)], "weight_decay": 0.01},
              {"params": [p for n, p in params if not decay(p)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for s in range(steps):
        rate = lr * s / WARMUP if s < WARMUP else lr * (steps - s) / (steps - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss, _ = loss_of(model, *(x[s + 1] for x in data))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in params], 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    return torch.tensor(losses), torch.tensor(norms)


def greedy(model, row, cached):
    ids, cache = row[:8].tolist(), transformers.DynamicCache() if cached else None
    for i in range(16):
        given = ids[-1:] if cached and i else ids
        ids.append(int(model(input_ids=torch.tensor([given]), past_key_values=cache, use_cache=cached).logits[0, -1].argmax()))
    return torch.tensor([ids], dtype=torch.int32)


def spell_old(path, change):
    c = json.loads(path.read_text())
    parameters = c.pop("rope_parameters")
    c["rope_theta"] = parameters.pop("rope_theta")
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name in parameters:
            c[name] = parameters.pop(name)
    kind = parameters.pop("rope_type")
    c["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    c["torch_dtype"] = c.pop("dtype")
    change(c)
    path.write_text(json.dumps(c, indent=2) + "\n")


def make(name):
    kind, extra, *special = CASES[name]
    how = HOW.get(name, USUAL)
    target = dict(target_modules=FUSED if kind == "phi3" else SEVEN)
    target.update(*special)
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model = build(kind, extra)
    model.save_pretrained(out / "model")
    (out / "model" / "generation_config.json").unlink(missing_ok=True)
    if how["old"]:
        spell_old(out / "model" / "config.json", how["old"])
    data = batches(model.config.vocab_size, how)
    golden = {"input_ids": data[0].int(), "attention_mask": data[1].int(), "labels": data[2].int()}

    loss, logits = loss_of(model, *(x[0] for x in data))
    loss.backward()
    golden["base.logits"], golden["base.loss"] = logits.detach(), loss.detach().reshape(1)
    golden.update({f"base.grad.{n}": p.grad.clone() for n, p in model.named_parameters()})
    with torch.no_grad():
        golden["base.greedy"] = greedy(build(kind, extra), data[0][0, 0], how["cached"])

    full = build(kind, extra)
    golden["full.losses"], golden["full.grad_norms"] = train(full, data, list(full.named_parameters()), lambda p: p.ndim > 1, FULL_LR,
                                                             how["full_steps"])

    torch.manual_seed(23)
    lora = peft.get_peft_model(build(kind, extra), peft.LoraConfig(r=how["rank"], lora_alpha=how["alpha"], lora_dropout=0.0,
                                                                   task_type="CAUSAL_LM", init_lora_weights=False, **target))
    lora.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    loss, logits = loss_of(lora, *(x[0] for x in data))
    loss.backward()
    golden["lora.logits"], golden["lora.loss"] = logits.detach(), loss.detach().reshape(1)
    params = [(n, p) for n, p in lora.named_parameters() if p.requires_grad]
    golden.update({f"lora.grad.{n}": p.grad.clone() for n, p in params})
    golden["lora.losses"], golden["lora.grad_norms"] = train(lora, data, params, lambda p: True, LR, how["steps"])
    golden.update({f"lora.final.{n.replace('.default', '')}": p.detach().clone() for n, p in params})
    with torch.no_grad():
        golden["merged.final.logits"] = loss_of(lora.merge_and_unload(), *(x[0] for x in data))[1]

    save_file({k: v.contiguous() for k, v in golden.items()}, out / "golden.safetensors")
    adam = dict(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01, max_grad_norm=1.0, warmup_steps=WARMUP)
    meta = {"case": name, "transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__,
            "hp": {"lr": LR, **adam, "steps": how["steps"], "schedule": "linear", "accum": 1},
            "full_hp": {"lr": FULL_LR, "steps": how["full_steps"], "note": "weight decay only on tensors with more than one dimension"},
            "lora": {"r": how["rank"], "lora_alpha": how["alpha"], **target}, "attn": "eager", "dtype": "float32",
            "open": how["open"]}
    if getattr(model.config, "output_router_logits", False):
        meta["router_aux_loss_coef"] = model.config.router_aux_loss_coef
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


for case in sys.argv[1:] or CASES:
    make(case)
    print(case)
