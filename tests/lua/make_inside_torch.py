"""Makes tests/lua/inside.safetensors: hidden states and attention maps of the small models of tests/golden by transformers.

    python tests/lua/make_inside_torch.py        needs torch and transformers

transformers 5.x, float32, attn_implementation "eager". Names: CASE.hidden (layers + 1, tokens, hidden) and CASE.attention
(layers, heads, tokens, tokens) for the ids 1, 2, 3, ... of CASE.ids.
"""
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    out = {}
    for case, count in (("llama_odd", 9), ("mistral_window", 24)):
        model = AutoModelForCausalLM.from_pretrained(
            ROOT / "tests/golden" / case / "model", dtype=torch.float32, attn_implementation="eager"
        )
        ids = torch.arange(1, count + 1, dtype=torch.int32)
        with torch.no_grad():
            seen = model(ids[None].long(), output_hidden_states=True, output_attentions=True)
        out[f"{case}.ids"] = ids
        out[f"{case}.hidden"] = torch.cat(seen.hidden_states).contiguous()
        out[f"{case}.attention"] = torch.cat(seen.attentions).contiguous()
    save_file(out, ROOT / "tests/lua/inside.safetensors")
    print({name: tuple(t.shape) for name, t in out.items()})


main()
