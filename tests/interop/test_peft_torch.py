"""PEFT and transformers load what unsloth-lua saves and answer the same; unsloth-lua loads what PEFT saves.

    test_peft_torch.py [MODEL_DIR ...]    default: ../shared/data/stories260K/hf, small models of every family and mixtures
"""
import argparse
import json
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import families
import reference

IDS = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421]
LIMIT = 1e-5  # relative, float32 on both sides


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def compare(model, name, checks):
    out = common.WORK / "peft"
    shutil.rmtree(out, ignore_errors=True)
    common.lua("export.lua", model, out, "f32")

    def agree(what, ours, theirs):
        error = reference.distance(ours, theirs)
        checks.check(error < LIMIT, f"{name}, {what}: {error:.1e}")

    base_ours, _ = common.answer(model, IDS, 1)
    base = torch_logits(load(model))
    agree("the base model", base_ours, base)

    # Ours -> PEFT.
    ours, _ = common.answer(model, IDS, 1, adapter=out / "adapter")
    adapted = torch_logits(PeftModel.from_pretrained(load(model), str(out / "adapter")))
    agree("our adapter in PEFT", ours, adapted)
    change = reference.distance(adapted, base)
    checks.check(change > 1e-2, f"{name}, the adapter changes the answers: {change:.1e}")

    # Ours, merged -> transformers.
    merged, _ = common.answer(out / "merged", IDS, 1)
    agree("our merged folder in transformers", merged, torch_logits(load(out / "merged")))
    if "peft_experts" not in str(model):  # rounding turns a router's decision now and then
        change = reference.distance(merged, adapted)
        checks.check(change < 2e-2, f"{name}, merging rounds to 16 bits and no more: {change:.1e}")
    text = "Once upon a time, there was a little girl."
    same = AutoTokenizer.from_pretrained(out / "merged").encode(text) == AutoTokenizer.from_pretrained(model).encode(text)
    checks.check(same, f"{name}, the tokenizer of the merged folder encodes as the model's own")

    # A GGUF -> ours, merged -> transformers: the config.json that is made of the metadata.
    common.lua("export.lua", next((out / "f32").glob("*.gguf")), out / "again")
    merged, _ = common.answer(out / "again" / "merged", IDS, 1)
    agree("a merged folder of a GGUF in transformers", merged, torch_logits(load(out / "again" / "merged")))

    # PEFT -> ours.
    torch.manual_seed(1)
    fused = load(model).config.model_type == "phi3"
    for targets in (["qkv_proj", "down_proj"] if fused else ["q_proj", "v_proj", "down_proj"], "all-linear"):
        config = LoraConfig(r=8, lora_alpha=4, target_modules=targets, init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM")
        theirs = get_peft_model(load(model), config)
        theirs.save_pretrained(str(out / "from_peft"))
        ours, _ = common.answer(model, IDS, 1, adapter=out / "from_peft")
        agree(f"PEFT's adapter on {targets} in ours", ours, torch_logits(theirs))


WORDS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}


def compare_old(model, checks):
    """Adapters on single experts, as they were saved before transformers 5 fused these."""
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    family = config["model_type"]
    if family not in WORDS:
        return
    folder, gate, up, down = WORDS[family]
    hidden, inter = config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
    torch.manual_seed(2)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config.get("num_experts", config.get("num_local_experts"))):
            for word, rows, cols in ((gate, inter, hidden), (up, inter, hidden), (down, hidden, inter)):
                base = f"base_model.model.model.layers.{layer}.{folder}.experts.{expert}.{word}"
                tensors[base + ".lora_A.weight"] = torch.randn(4, cols) * 0.1
                tensors[base + ".lora_B.weight"] = torch.randn(rows, 4) * 0.1
    out = common.WORK / "peft_old"
    shutil.rmtree(out, ignore_errors=True)
    LoraConfig(r=4, lora_alpha=8, target_modules=[gate, up, down], task_type="CAUSAL_LM").save_pretrained(out)
    save_file(tensors, out / "adapter_model.safetensors")
    theirs = torch_logits(PeftModel.from_pretrained(load(model), str(out)))
    ours, _ = common.answer(model, IDS, 1, adapter=out)
    error = reference.distance(ours, theirs)
    change = reference.distance(ours, torch_logits(load(model)))
    checks.check(error < LIMIT and change > 1e-2, f"{family}, an adapter on single experts: {error:.1e}, it changes {change:.1e}")


def mixtures():
    out = common.WORK / "peft_experts"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    common.lua("experts.lua", out)
    return sorted(map(str, out.glob("*/merged")))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    checks = common.Checks()
    stories, folders = common.SHARED / "data/stories260K/hf", common.WORK / "peft_families"
    models = [(model, pathlib.Path(model).name) for model in args.models]
    if not models:
        models = [(str(stories), "stories260K")] if stories.is_dir() else []
        shutil.rmtree(folders, ignore_errors=True)
        for name in families.FAMILIES:
            families.make(name, folders / name)
            models.append((folders / name, name))
        models += [(model, pathlib.Path(model).parent.name) for model in mixtures()]
    for model, name in models:
        compare(model, name, checks)
        compare_old(model, checks)
    checks.end()


if __name__ == "__main__":
    main()
