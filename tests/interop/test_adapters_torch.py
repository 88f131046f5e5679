"""Every kind of adapter: PEFT answers the same with what unsloth-lua saves, transformers with what it merges, unsloth-lua with what PEFT
saves.

    test_adapters_torch.py [MODEL_DIR ...]    default: ../shared/data/stories260K/hf and tests/golden/adapter_models/*
"""
import argparse
import inspect
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft.utils import loftq_utils
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import common
import reference

IDS = [1, 40, 17, 26, 37, 43, 38, 28, 26, 37, 29, 31, 42]
LIMIT = 1e-5  # relative, float32 on both sides
try:
    import bitsandbytes  # noqa: F401, what LoftQ quantises with
    import scipy  # noqa: F401, what PEFT asks for then
except ImportError:
    bitsandbytes = None


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def load(path, extra=0):
    """With a vocabulary larger by `extra`: rows of random numbers, which the adapter's folder brings its own for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if extra:
        model.resize_token_embeddings(model.config.vocab_size + extra)
    return model


def loftq_on_cpu():
    """PEFT wants a GPU for LoftQ: its own code, with the CPU in that place."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"xpu" if is_xpu_available() else "cuda"', '"cpu"')
    exec(compile(source, "loftq_init", "exec"), loftq_utils.__dict__)
    lora_layer.loftq_init = loftq_utils.loftq_init


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THEIRS = {
    "dora": dict(target_modules="all-linear", use_dora=True),
    "dora with patterns": dict(target_modules=SEVEN, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"layers.0.*": 5}),
    "regular expression": dict(target_modules=r".*\.[01]\.(self_attn\.q_proj|mlp\.down_proj)"),
    "layers_pattern": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "modules_to_save": dict(target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "modules_to_save, tied": dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "modules_to_save of norms": dict(target_modules=["v_proj"], modules_to_save=["input_layernorm"]),
    "embed_tokens and lm_head": dict(target_modules=["v_proj", "embed_tokens", "lm_head"]),
    "bias all": dict(target_modules=["o_proj", "up_proj"], bias="all"),
    "bias lora_only": dict(target_modules=["o_proj", "up_proj"], bias="lora_only"),
    "resized": dict(target_modules=["q_proj"], extra=3),
    "resized, modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], extra=3),
    "resized, modules_to_save, tied": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, extra=3),
    "resized, embed_tokens saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], extra=3),
    "resized, embed_tokens and lm_head": dict(target_modules=["v_proj", "embed_tokens", "lm_head"], extra=3),
    "pissa": dict(target_modules=SEVEN, init_lora_weights="pissa"),
    "loftq": dict(target_modules=SEVEN, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 3}),
}


def check_ours(checks, model, out):
    common.lua("export_kinds.lua", model, out, *IDS)
    plain = torch_logits(load(model))
    for folder in sorted(out.iterdir()):
        kind, tensors = folder.name, load_file(folder / "logits.safetensors")
        extra, ids, base = 0, IDS, plain
        if kind.startswith("resized"):
            extra = tensors["base"].shape[1] - plain.shape[1]
            ids = [*IDS[:-1], tensors["base"].shape[1] - 1]
            base = tensors["base"]

        def agree(what, ours, theirs):
            error = reference.distance(ours, theirs)
            checks.check(error < LIMIT, f"{kind}, {what}: {error:.1e}")

        agree("the base", tensors["base"], base)
        change = reference.distance(tensors["logits"], base)
        checks.check(change > 1e-3, f"{kind}, the adapter changes the answers: {change:.1e}")
        if kind.startswith("pissa"):
            agree("the start is the base", tensors["start"], base)
            agree("as plain LoRA in PEFT", tensors["logits"], torch_logits(PeftModel.from_pretrained(load(model), str(folder / "as_lora"))))
        # PEFT takes another random part of the base each time it loads such an adapter: only plain LoRA carries it.
        if kind != "pissa_niter" and (not kind.startswith("loftq") or bitsandbytes):
            agree("in PEFT", tensors["logits"], torch_logits(PeftModel.from_pretrained(load(model, extra), str(folder / "adapter")), ids))
        agree("merged in transformers", tensors["logits"], torch_logits(load(folder / "merged"), ids))
        if "gguf" in tensors:
            agree("as GGUF", tensors["logits"], tensors["gguf"])
        ours, _ = common.answer(model, ids, 1, adapter=folder / "adapter")
        agree("loaded again", ours, tensors["logits"])


def check_theirs(checks, model, out):
    for kind, options in THEIRS.items():
        if "loftq" in kind and not bitsandbytes:
            continue
        torch.manual_seed(1)
        options = dict(options)
        start = load(model, options.pop("extra", 0))
        ids = [*IDS[:-1], start.config.vocab_size - 1]
        theirs = get_peft_model(start, LoraConfig(**{"r": 4, "lora_alpha": 4 if kind == "loftq" else 8, "init_lora_weights": False, **options}))
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p) * p.std() if p.numel() > 1 else 0)
        folder = out / "theirs" / kind.replace(" ", "_")
        theirs.save_pretrained(str(folder))
        ours, _ = common.answer(model, ids, 1, adapter=folder)
        error = reference.distance(ours, torch_logits(theirs, ids))
        checks.check(error < LIMIT, f"PEFT's {kind} in ours: {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[str(common.SHARED / "data/stories260K/hf"),
                                                      *map(str, sorted((common.ROOT / "tests/golden/adapter_models").iterdir()))])
    args = parser.parse_args()
    checks = common.Checks()
    if bitsandbytes:
        loftq_on_cpu()
    for model in args.models:
        if not pathlib.Path(model).is_dir():
            print(f"SKIP {model} is not here")
            continue
        print(model)
        out = common.WORK / "adapters" / pathlib.Path(model).parent.name / pathlib.Path(model).name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        check_ours(checks, model, out)
        check_theirs(checks, model, out)
    checks.end()


if __name__ == "__main__":
    main()
