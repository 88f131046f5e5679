"""A model in float64 NumPy from a .gguf, decoded by the gguf package: the truth that ours and llama.cpp are measured by."""
import numpy as np
from gguf import GGUFReader, dequantize


class Gguf:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.types = {t.tensor_type.name for t in reader.tensors if t.name.endswith(".weight") and len(t.shape) > 1}
        self.cache = {}

    def value(self, key, default=None):
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def weight(self, name):
        """Returns the tensor decoded, float32 (its values are exact in it); None when there is none."""
        if name not in self.tensors:
            return None
        if name not in self.cache:
            t = self.tensors[name]
            self.cache[name] = dequantize(t.data, t.tensor_type).reshape(tuple(int(n) for n in reversed(t.shape)))
        return self.cache[name]


def exact(x):
    return x


def as_f16(x):
    return x.astype(np.float16).astype(np.float64)


def as_bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def as_q8(x, block):
    """Blocks in eight bits with one scale, as llama.cpp keeps the activations it multiplies quantised weights by."""
    blocks = x.reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.round(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


ROUNDING = {"F32": exact, "F16": as_f16, "BF16": as_bf16}


def rounded_for(weight_type, x):
    """x as llama.cpp rounds it before a product with weights of that type."""
    return ROUNDING[weight_type](x) if weight_type in ROUNDING else as_q8(x, 256 if weight_type.endswith("_K") else 32)


def rms_norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def cap(x, limit):
    return limit * np.tanh(x / limit) if limit else x


# What the metadata of a family leaves unsaid.
FAMILIES = {
    "llama": {"interleaved": True},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"act": gelu, "scaled": True},
    "gemma2": {"act": gelu, "scaled": True, "period": 2},
    "gemma3": {"act": gelu, "scaled": True, "period": 6, "local_base": 10000.0},
}


def logits(gguf, ids, rounded=False):
    """Returns (len(ids), vocabulary) float64. rounded: with the activations rounded as llama.cpp does, everything else exact."""
    arch = gguf.value("general.architecture")
    family = FAMILIES[arch]
    v = lambda key, default=None: gguf.value(f"{arch}.{key}", default)
    hidden, layers, heads = v("embedding_length"), v("block_count"), v("attention.head_count")
    kv_heads = v("attention.head_count_kv", heads)
    width = v("attention.key_length", hidden // heads)
    eps, base = v("attention.layer_norm_rms_epsilon"), v("rope.freq_base", 10000.0)
    act, n = family.get("act", silu), len(ids)

    def linear(x, name):
        t = gguf.tensors.get(name) or gguf.tensors["token_embd.weight"]
        if rounded:
            x = rounded_for(t.tensor_type.name, x)
        bias = gguf.weight(name.replace(".weight", ".bias"))
        return x @ gguf.weight(t.name).T.astype(np.float64) + (0 if bias is None else bias)

    def norm(x, name):
        """Where there is no such norm, the values themselves."""
        w = gguf.weight(name)
        return x if w is None else rms_norm(x, w, eps)

    def activate(x):
        if rounded and act is gelu:  # llama.cpp looks it up in a table of halves
            return np.where(x <= -10, 0, np.where(x >= 10, x, as_f16(act(as_f16(x)))))
        return act(x)

    half = v("rope.dimension_count", width) // 2
    scaling = v("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise NotImplementedError(f"rope scaling {scaling}")
    factors = gguf.weight("rope_freqs.weight")

    def turner(base, scaled):
        frequency = base ** (-np.arange(half) / half)
        if scaled and scaling == "linear":
            frequency = frequency / v("rope.scaling.factor")
        if factors is not None:
            frequency = frequency / factors.astype(np.float64)
        angle = np.arange(n)[:, None] * frequency[None, :]
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        # llama.cpp keeps q and k of some families so that neighbours (2i, 2i + 1) turn together.
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if family.get("interleaved") else (slice(0, half), slice(half, 2 * half))

        def rope(x):
            a, b = x[..., first], x[..., second]
            out = x.copy()
            out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
            return out

        return rope

    rope, future = turner(base, True), np.triu(np.full((n, n), -np.inf), 1)
    period, window = v("attention.sliding_window_pattern", family.get("period")), v("attention.sliding_window", 0)
    local_rope = turner(v("rope.freq_base_swa", family.get("local_base", base)), "local_base" not in family)
    local_future = future + np.tril(np.full((n, n), -np.inf), -window) if window else future
    x = gguf.weight("token_embd.weight")[ids].astype(np.float64)
    if family.get("scaled"):
        x = x * np.sqrt(hidden)
    for i in range(layers):
        p = f"blk.{i}."
        local = period and window and (i + 1) % period != 0
        turn = local_rope if local else rope
        h = norm(x, p + "attn_norm.weight")
        q = turn(norm(linear(h, p + "attn_q.weight").reshape(n, heads, width), p + "attn_q_norm.weight"))
        k = turn(norm(linear(h, p + "attn_k.weight").reshape(n, kv_heads, width), p + "attn_k_norm.weight"))
        w = linear(h, p + "attn_v.weight").reshape(n, kv_heads, width)
        k, w = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, w))
        score = cap(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width), v("attn_logit_softcapping")) + (local_future if local else future)
        score = np.exp(score - score.max(-1, keepdims=True))
        score /= score.sum(-1, keepdims=True)
        o = linear(np.einsum("hqk,khd->qhd", score, w).reshape(n, heads * width), p + "attn_output.weight")
        x = x + norm(o, p + "post_attention_norm.weight")
        h = norm(x, p + "ffn_norm.weight")
        down = linear(activate(linear(h, p + "ffn_gate.weight")) * linear(h, p + "ffn_up.weight"), p + "ffn_down.weight")
        x = x + norm(down, p + "post_ffw_norm.weight")
    return cap(linear(norm(x, "output_norm.weight"), "output.weight"), v("final_logit_softcapping"))


def centred(x):
    """Logits and log-probabilities differ by a constant per row; this takes it out."""
    x = np.asarray(x, dtype=np.float64)
    return x - x.mean(-1, keepdims=True)


def distance(a, b):
    a, b = centred(a), centred(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
