"""Small models of every family with random weights, for the comparisons with other programs."""
import json

import numpy as np
from safetensors.numpy import load_file, save_file

import common

# What differs from BASE. Windows are shorter than the rows that are compared.
BASE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0, initializer_range=0.08, pad_token_id=0)
LONG = dict(partial_rotary_factor=0.75, max_position_embeddings=2048,
            rope_scaling=dict(type="longrope", short_factor=[1 + 0.1 * i for i in range(6)], long_factor=[1.5 + 0.7 * i for i in range(6)]))
FAMILIES = {
    "llama_yarn": ("LlamaForCausalLM", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "llama_factor": ("LlamaForCausalLM", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32,
                                                                 attention_factor=1.3))),
    "qwen2": ("Qwen2ForCausalLM", dict()),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=24, tie_word_embeddings=True)),
    "gemma": ("GemmaForCausalLM", dict(head_dim=32, hidden_act="gelu_pytorch_tanh")),
    "gemma2": ("Gemma2ForCausalLM", dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=7, attn_logit_softcapping=3.0,
                                         final_logit_softcapping=4.0)),
    "gemma3": ("Gemma3ForCausalLM", dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=7, num_hidden_layers=7,
                                         rope_theta=1000000.0, rope_scaling=dict(rope_type="linear", factor=8.0))),
    # Their folders, and so their general.name, must not say "phi3": llama.cpp then wants tokens that only the real tokenizer has.
    "fused": ("Phi3ForCausalLM", dict(tie_word_embeddings=True)),
    # llama.cpp takes the long factors wherever its context, of 256 here, is longer than the original one; ours where the row is.
    "fused_short": ("Phi3ForCausalLM", dict(LONG, original_max_position_embeddings=512)),
    "fused_long": ("Phi3ForCausalLM", dict(LONG, original_max_position_embeddings=4)),
}


def make(name, folder):
    """A folder with random weights, norms and biases too, and the tokenizer of the repository's example."""
    architecture, changes = FAMILIES[name]
    kind = architecture.removesuffix("ForCausalLM").lower()
    config = {**BASE, **changes, "architectures": [architecture], "model_type": "gemma3_text" if kind == "gemma3" else kind}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    common.lua("random_model.lua", folder / "config.json", common.ROOT / "examples/tiny-llama", folder)
    weights = load_file(folder / "model.safetensors")
    random = np.random.default_rng(3)
    for key, w in weights.items():
        if w.ndim == 1:
            weights[key] = (w + 0.2 * random.standard_normal(w.shape)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
