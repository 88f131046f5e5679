"""Mixtures of experts in GGUF files: llama.cpp (xllamacpp) reads ours and answers as we do, and we read them as we read the
folder beside them.

    test_experts.py [FAMILY ...]
"""
import re
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

import common
import reference
from test_llama_cpp import LlamaCpp

IDS = [1, 40, 77, 300, 12, 199, 431, 86, 250]
COUNT = 6
SEEDS = 1, 3  # of the random weights
SHARE = 20  # one row of so many may turn


def log_softmax(rows):
    rows = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def rows_apart(a, b):
    """The distance of each row."""
    return [reference.distance(x[None], y[None]) for x, y in zip(a, b)]


def decode(source, path):
    """Rewrites a file with its blocks decoded, by ggml's own formulas in Python."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_keys(source, path, kv_lora=64, narrow=32, rotated=16, v_dim=32, heads=4):
    """Rewrites a DeepSeek file as newer converters do: kv_b as two tensors, that of k transposed."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    lengths = {"head_count_kv": 1, "key_length": kv_lora + rotated, "value_length": kv_lora, "key_length_mla": narrow + rotated,
               "value_length_mla": v_dim}
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name.rpartition(".")[2] in lengths:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for key, value in lengths.items():
        writer.add_uint32(f"{arch}.attention.{key}", value)
    for tensor in reader.tensors:
        if "attn_kv_b" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        kv = tensor.data.reshape(heads, narrow + v_dim, kv_lora)
        writer.add_tensor(tensor.name.replace("kv_b", "k_b"), np.ascontiguousarray(kv[:, :narrow].transpose(0, 2, 1)))
        writer.add_tensor(tensor.name.replace("kv_b", "v_b"), np.ascontiguousarray(kv[:, narrow:]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fuse(source, path):
    """Rewrites a folder with the experts' tensors as transformers 5 holds them in memory: three dimensions."""
    path.mkdir()
    shutil.copy(source / "config.json", path)
    kept, parts = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        found = re.fullmatch(r"(model\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight", name)
        if found:
            parts.setdefault(found[1], {})[found[3], int(found[2])] = tensor
        else:
            kept[name] = tensor
    for layer, tensors in parts.items():
        gate, up, down = ("w1", "w3", "w2") if ("w1", 0) in tensors else ("gate_proj", "up_proj", "down_proj")
        experts = range(len(tensors) // 3)
        both = [np.concatenate([tensors[gate, e], tensors[up, e]]) for e in experts]
        kept[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(both)
        kept[f"{layer}.mlp.experts.down_proj"] = np.stack([tensors[down, e] for e in experts])
    save_file(kept, path / "model.safetensors")


class Rows:
    """Rows that quantised files move. One that stays on its experts moves by the noise of 8 bits (0.009 to 0.035 was seen, of 4 bits
    0.06 to 0.31); one whose router had two experts all but level may go to the other, in any program, and jumps. So each row must be
    within the limit or counts as turned, and of all families and seeds together only a few may be."""

    def __init__(self):
        self.count, self.turned = 0, []

    def add(self, name, distances, limit):
        self.count += len(distances)
        self.turned += [f"{name} row {i}: {x:.2f}" for i, x in enumerate(distances) if not x < limit]
        print(f"{name}: {min(distances):.3f} to {max(distances):.3f}", flush=True)

    def check(self, checks):
        few = self.count // SHARE
        checks.check(len(self.turned) <= few, f"{len(self.turned)} of {self.count} rows turned, {few} may: {', '.join(self.turned)}")


def compare(out, family, checks, rows):
    folder, _ = common.answer(out / family / "merged", IDS, 1)
    fuse(out / family / "merged", out / family / "fused")
    fused, _ = common.answer(out / family / "fused", IDS, 1)
    error = reference.distance(fused, folder)
    checks.check(error < 1e-6, f"{family}: a folder of fused experts is as far as {error:.1e} from that of single ones")
    methods = {"f32": 1e-6, "q8_0": 0.05, "q4_k_m": 0.4}
    if family.startswith("deepseek"):
        split_keys(out / family / "f32.gguf", out / family / "split.gguf")
        methods["split"] = 1e-6
    for method, limit in methods.items():
        path = out / family / f"{method}.gguf"
        quantised = method.startswith("q")
        mine, _ = common.answer(path, IDS, 1)
        if quantised:
            # Not a bit of what follows is ours: the blocks, decoded by another program, answer the same.
            decode(path, out / family / "decoded.gguf")
            decoded, _ = common.answer(out / family / "decoded.gguf", IDS, 1)
            error = reference.distance(mine, decoded)
            checks.check(error < 1e-5, f"{family}, {method}: as far as {error:.1e} from the same blocks decoded by ggml's Python")
            rows.add(f"{family}, {method}, from the folder", rows_apart(mine, folder), limit)
        else:
            error = reference.distance(mine, folder)
            checks.check(error < limit, f"{family}, {method}: the file is as far as {error:.1e} from the folder")
        llama = LlamaCpp(path)
        ids, theirs = llama.log_probabilities(IDS, COUNT, mine.shape[1])
        checks.check(len(ids) == COUNT, f"{family}, {method}: llama.cpp loads it and answers {len(ids)} ids")
        if not ids:
            continue
        ours, _ = common.answer(path, IDS + ids[:-1], 1)
        ours = log_softmax(ours[len(IDS) - 1 :])
        if quantised:
            rows.add(f"{family}, {method}, llama.cpp", rows_apart(theirs, ours), 0.05)
        else:
            error = reference.distance(theirs, ours)
            checks.check(error < 1e-4, f"{family}, {method}: llama.cpp lies {error:.1e} from us")
    compare_adapter(out / family, family, checks)


def compare_adapter(folder, family, checks):
    """llama.cpp puts our adapter on the model, its experts too, and answers as we do with it."""
    plain, _ = common.answer(folder / "merged", IDS, 1)
    ids, theirs = LlamaCpp(folder / "f32.gguf", adapter=folder / "lora.gguf").log_probabilities(IDS, COUNT, plain.shape[1])
    checks.check(len(ids) > 0, f"{family}: llama.cpp loads the adapter and answers {len(ids)} ids")
    if not ids:
        return
    forced = IDS + ids[:-1]
    ours, _ = common.answer(folder / "merged", forced, 1, adapter=folder / "adapter")
    plain, _ = common.answer(folder / "merged", forced, 1)
    error, effect = reference.distance(theirs, log_softmax(ours[len(IDS) - 1 :])), reference.distance(plain, ours)
    checks.check(error < 1e-4 and effect > 1e-2, f"{family}: our adapter in llama.cpp: {error:.1e}, and it changes answers by {effect:.1e}")


def main():
    checks, rows = common.Checks(), Rows()
    for seed in SEEDS:
        out = common.WORK / "experts" / str(seed)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        common.lua("experts.lua", out, seed)
        for path in sorted(out.iterdir()):
            if path.name in (sys.argv[1:] or path.name):
                compare(out, path.name, checks, rows)
    rows.check(checks)
    checks.end()


if __name__ == "__main__":
    main()
