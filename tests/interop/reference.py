"""A Llama in float64 NumPy from a .gguf, decoded by the gguf package: the truth that ours and llama.cpp are measured by."""
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


def logits(gguf, ids, rounded=False):
    """Returns (len(ids), vocabulary) float64. rounded: with the activations rounded as llama.cpp does, everything else exact."""
    v = lambda key, default=None: gguf.value("llama." + key, default)
    hidden, layers, heads = v("embedding_length"), v("block_count"), v("attention.head_count")
    kv_heads = v("attention.head_count_kv", heads)
    width = v("attention.key_length", hidden // heads)
    eps, base = v("attention.layer_norm_rms_epsilon"), v("rope.freq_base", 10000.0)
    n = len(ids)

    def linear(x, name):
        t = gguf.tensors.get(name) or gguf.tensors["token_embd.weight"]
        if rounded:
            x = rounded_for(t.tensor_type.name, x)
        return x @ gguf.weight(t.name).T.astype(np.float64)

    # llama.cpp keeps q and k so that neighbours (2i, 2i + 1) turn together.
    half = v("rope.dimension_count", width) // 2
    frequency = base ** (-np.arange(half) / half)
    scaling = v("rope.scaling.type", "none")
    if scaling == "linear":
        frequency = frequency / v("rope.scaling.factor")
    elif scaling != "none":
        raise NotImplementedError(f"rope scaling {scaling}")
    factors = gguf.weight("rope_freqs.weight")
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    angle = np.arange(n)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]

    def rope(x):
        even, odd = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out = x.copy()
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = even * cos - odd * sin, even * sin + odd * cos
        return out

    future = np.triu(np.full((n, n), -np.inf), 1)
    x = gguf.weight("token_embd.weight")[ids].astype(np.float64)
    for i in range(layers):
        p = f"blk.{i}."
        h = rms_norm(x, gguf.weight(p + "attn_norm.weight"), eps)
        q = rope(linear(h, p + "attn_q.weight").reshape(n, heads, width))
        k = rope(linear(h, p + "attn_k.weight").reshape(n, kv_heads, width))
        w = linear(h, p + "attn_v.weight").reshape(n, kv_heads, width)
        k, w = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, w))
        score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width) + future
        score = np.exp(score - score.max(-1, keepdims=True))
        score /= score.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", score, w).reshape(n, heads * width), p + "attn_output.weight")
        h = rms_norm(x, gguf.weight(p + "ffn_norm.weight"), eps)
        gate, up = linear(h, p + "ffn_gate.weight"), linear(h, p + "ffn_up.weight")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, p + "ffn_down.weight")
    return linear(rms_norm(x, gguf.weight("output_norm.weight"), eps), "output.weight")


def centred(x):
    """Logits and log-probabilities differ by a constant per row; this takes it out."""
    x = np.asarray(x, dtype=np.float64)
    return x - x.mean(-1, keepdims=True)


def distance(a, b):
    a, b = centred(a), centred(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
