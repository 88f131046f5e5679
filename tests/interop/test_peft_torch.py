"""PEFT and transformers load what unsloth-lua saves and answer the same; unsloth-lua loads what PEFT saves.

    test_peft_torch.py [MODEL_DIR ...]    default: ../shared/data/stories260K/hf and small models of every family
"""
import argparse
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
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


def compare(model, checks):
    out = common.WORK / "peft"
    shutil.rmtree(out, ignore_errors=True)
    common.lua("export.lua", model, out, "f32")

    def agree(what, ours, theirs):
        error = reference.distance(ours, theirs)
        checks.check(error < LIMIT, f"{pathlib.Path(model).name}: {what}: {error:.1e}")

    base_ours, _ = common.answer(model, IDS, 1)
    base = torch_logits(load(model))
    agree("the base model", base_ours, base)

    # Ours -> PEFT.
    ours, _ = common.answer(model, IDS, 1, adapter=out / "adapter")
    adapted = torch_logits(PeftModel.from_pretrained(load(model), str(out / "adapter")))
    agree("our adapter in PEFT", ours, adapted)
    change = reference.distance(adapted, base)
    checks.check(change > 1e-2, f"the adapter changes the answers: {change:.1e}")

    # Ours, merged -> transformers.
    merged, _ = common.answer(out / "merged", IDS, 1)
    agree("our merged folder in transformers", merged, torch_logits(load(out / "merged")))
    change = reference.distance(merged, adapted)
    checks.check(change < 2e-2, f"merging rounds to 16 bits and no more: {change:.1e}")
    text = "Once upon a time, there was a little girl."
    same = AutoTokenizer.from_pretrained(out / "merged").encode(text) == AutoTokenizer.from_pretrained(model).encode(text)
    checks.check(same, "the tokenizer of the merged folder encodes as the model's own")

    # A GGUF -> ours, merged -> transformers: the config.json that is made of the metadata.
    common.lua("export.lua", next((out / "f32").glob("*.gguf")), out / "again")
    merged, _ = common.answer(out / "again" / "merged", IDS, 1)
    agree("a merged folder of a GGUF in transformers", merged, torch_logits(load(out / "again" / "merged")))

    # PEFT -> ours.
    torch.manual_seed(1)
    fused = load(model).config.model_type == "phi3"
    for targets in (["qkv_proj", "down_proj"] if fused else ["q_proj", "v_proj", "down_proj"], "all-linear"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM")
        theirs = get_peft_model(load(model), config)
        theirs.save_pretrained(str(out / "from_peft"))
        ours, _ = common.answer(model, IDS, 1, adapter=out / "from_peft")
        agree(f"PEFT's adapter on {targets} in ours", ours, torch_logits(theirs))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    args = parser.parse_args()
    checks = common.Checks()
    models = args.models
    if not models:
        stories = common.SHARED / "data/stories260K/hf"
        models = [stories] if stories.is_dir() else []
        for name in families.FAMILIES:
            folder = common.WORK / "peft_families" / name
            shutil.rmtree(folder, ignore_errors=True)
            families.make(name, folder)
            models.append(folder)
    for model in models:
        compare(model, checks)
    checks.end()


if __name__ == "__main__":
    main()
