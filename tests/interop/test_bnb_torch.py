"""bitsandbytes and transformers load merged 4-bit folders: the same codes as bitsandbytes makes of the weights, the same values, logits
of what they decode to.

    test_bnb_torch.py [MODEL_DIR]        default: examples/tiny-llama
"""
import argparse
import importlib.util
import json
import shutil

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import reference

IDS = [1022, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(common.ROOT / "examples/tiny-llama"))
    args = parser.parse_args()
    if not importlib.util.find_spec("bitsandbytes"):
        common.skip("bitsandbytes is not here")
    import bitsandbytes.functional as bnb

    checks = common.Checks()
    out = common.WORK / "bnb"
    shutil.rmtree(out, ignore_errors=True)
    common.program("export", args.model, "--to", "merged_4bit", "--output", out)
    folder = out / "merged_4bit"

    # Against bitsandbytes' own quantisation of the same weights.
    plain, ours = load_file(f"{args.model}/model.safetensors"), load_file(folder / "model.safetensors")
    names = [name for name in plain if name + ".absmax" in ours]
    checks.check(len(names) == 7 * json.loads((folder / "config.json").read_text())["num_hidden_layers"], f"{len(names)} weights in 4 bits")
    codes = scales = 0.0
    for name in names:
        theirs, state = bnb.quantize_4bit(plain[name].float(), blocksize=64, quant_type="nf4", compress_statistics=True)
        codes = max(codes, (ours[name] != theirs).float().mean().item())
        decoded = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        again = ours[name + ".nested_quant_map"][ours[name + ".absmax"].long()] * ours[name + ".nested_absmax"].repeat_interleave(256)[: decoded.numel()]
        bits = bytes(ours[name + ".quant_state.bitsandbytes__nf4"].tolist())
        again = again + json.loads(bits)["nested_offset"]
        scales = max(scales, ((again - decoded).norm() / decoded.norm()).item())
    checks.check(codes < 1e-4, f"codes that differ from bitsandbytes': {codes:.1e}")
    checks.check(scales < 1e-3, f"scales differ by {scales:.1e}")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = {type(module).__name__ for module in model.modules()}
    checks.check("Linear4bit" in kinds, f"transformers {kinds & {'Linear4bit', 'Linear'}} on {model.device}")
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].float().numpy()
    base, _ = common.answer(args.model, IDS, 1)
    four, _ = common.answer(args.model, IDS, 1, four=True)
    error, cost = reference.distance(logits, four), reference.distance(four, base)
    # It multiplies in bfloat16, as the config says.
    checks.check(error < 2e-2 and error < cost / 2, f"logits differ by {error:.1e} from ours in 4 bits, which differ by {cost:.1e} from 16 bits")
    text = "Once upon a time, there was 1 dog."
    same = AutoTokenizer.from_pretrained(folder).encode(text) == AutoTokenizer.from_pretrained(args.model).encode(text)
    checks.check(same, "the tokenizer of the folder encodes as the model's own")
    checks.end()


if __name__ == "__main__":
    main()
