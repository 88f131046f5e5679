"""A decoder in float64 NumPy from a .gguf, decoded by the gguf package: the truth that ours and llama.cpp are measured by."""
import numpy as np
from gguf import GGUFReader, dequantize


class Gguf:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.types = {t.tensor_type.name for t in reader.tensors if t.name.endswith(".weight") and len(t.shape) > 1}
        self.cache, self.values = {}, {}

    def value(self, key, default=None):
        field = self.fields.get(key)
        if field is not None and key not in self.values:
            self.values[key] = field.contents()  # of a vocabulary, a second
        return self.values.get(key, default)

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


LATTICES = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS".split()
ROUNDING = {"F32": exact, "F16": as_f16, "BF16": as_bf16}


def rounded_for(weight_type, x):
    """x as llama.cpp rounds it before a product with weights of that type."""
    return ROUNDING[weight_type](x) if weight_type in ROUNDING else as_q8(x, 256 if weight_type.endswith("_K") or weight_type in LATTICES else 32)


def rms_norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_table(x):
    """llama.cpp looks it up in 16 bits."""
    return np.where(np.abs(x) < 10, as_f16(gelu(as_f16(x))), np.maximum(x, 0))


# What the metadata does not say. neox: the halves of a head turn together, not neighbours. Of `period` layers the last has no window; layers
# with one may have angles of their own.
FAMILIES = {
    "llama": dict(),
    "qwen2": dict(neox=True),
    "qwen3": dict(neox=True),
    "phi3": dict(neox=True),
    "gemma": dict(neox=True, gelu=True, scaled=True),
    "gemma2": dict(neox=True, gelu=True, scaled=True, period=2),
    "gemma3": dict(neox=True, gelu=True, scaled=True, period=6, local=10000.0),
}


def logits(gguf, ids, rounded=False):
    """Returns (len(ids), vocabulary) float64. rounded: with the activations rounded as llama.cpp does, everything else exact."""
    arch = gguf.value("general.architecture")
    family = FAMILIES[arch]
    v = lambda key, default=None: gguf.value(arch + "." + key, default)
    hidden, layers, heads = v("embedding_length"), v("block_count"), v("attention.head_count")
    kv_heads = v("attention.head_count_kv", heads)
    width = v("attention.key_length", hidden // heads)
    eps, base = v("attention.layer_norm_rms_epsilon"), v("rope.freq_base", 10000.0)
    window, score_cap, logit_cap = (v(k, 0) for k in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"))
    period, n = v("attention.sliding_window_pattern", family.get("period")), len(ids)

    def linear(x, name, bias=None):
        t = gguf.tensors.get(name) or gguf.tensors["token_embd.weight"]
        if rounded:
            x = rounded_for(t.tensor_type.name, x)
        y = x @ gguf.weight(t.name).T.astype(np.float64)
        return y if bias is None or gguf.weight(bias) is None else y + gguf.weight(bias)

    half = v("rope.dimension_count", width) // 2
    own = base ** (-np.arange(half) / half)
    scaling, turn = v("rope.scaling.type", "none"), 1.0
    factors = gguf.weight("rope_freqs.weight")
    if scaling == "linear":
        own = own / v("rope.scaling.factor")
    elif scaling == "yarn":
        factor, original = v("rope.scaling.factor"), v("rope.scaling.original_context_length")
        low, high = (2 * half * np.log(original / (beta * 2 * np.pi)) / (2 * np.log(base)) for beta in (v("rope.scaling.yarn_beta_fast", 32), v("rope.scaling.yarn_beta_slow", 1)))
        low, high = max(np.floor(low), 0), min(np.ceil(high), 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
        own = own / factor * ramp + own * (1 - ramp)
        turn = v("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * np.log(factor))
    elif scaling == "longrope":
        factors = gguf.weight(f"rope_factors_{'long' if n > v('rope.scaling.original_context_length') else 'short'}.weight")
        turn = v("rope.scaling.attn_factor")
    elif scaling != "none":
        raise NotImplementedError(f"rope scaling {scaling}")
    if factors is not None:
        own = own / factors.astype(np.float64)

    def rope(x, frequency):
        angle = np.arange(n)[:, None] * frequency[None, :]
        cos, sin = np.cos(angle)[:, None, :] * turn, np.sin(angle)[:, None, :] * turn
        left = slice(0, half) if family.get("neox") else slice(0, 2 * half, 2)
        right = slice(half, 2 * half) if family.get("neox") else slice(1, 2 * half, 2)
        out = x.copy()
        out[..., left], out[..., right] = x[..., left] * cos - x[..., right] * sin, x[..., left] * sin + x[..., right] * cos
        return out

    def normed(x, name):
        w = gguf.weight(name)
        return x if w is None else rms_norm(x, w, eps)

    def capped(x, cap):
        return cap * np.tanh(x / cap) if cap else x

    place = np.arange(n)[:, None] - np.arange(n)[None, :]
    activation = (gelu_table if rounded else gelu) if family.get("gelu") else silu
    x = gguf.weight("token_embd.weight")[ids].astype(np.float64)
    if family.get("scaled"):
        x = x * np.float32(np.sqrt(np.float32(hidden))).astype(np.float64)
    for i in range(layers):
        p = f"blk.{i}."
        windowed = window and period and (i + 1) % period
        frequency = v("rope.freq_base_swa", family["local"]) ** (-np.arange(half) / half) if windowed and "local" in family else own
        h = normed(x, p + "attn_norm.weight")
        if gguf.weight(p + "attn_qkv.weight") is not None:
            q, k, w = np.split(linear(h, p + "attn_qkv.weight"), [heads * width, (heads + kv_heads) * width], axis=1)
        else:
            q, k, w = (linear(h, f"{p}attn_{t}.weight", f"{p}attn_{t}.bias") for t in "qkv")
        q, k, w = q.reshape(n, heads, width), k.reshape(n, kv_heads, width), w.reshape(n, kv_heads, width)
        q, k = rope(normed(q, p + "attn_q_norm.weight"), frequency), rope(normed(k, p + "attn_k_norm.weight"), frequency)
        k, w = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, w))
        score = capped(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width), score_cap)
        score = np.where((place < 0) | (place >= window if windowed else False), -np.inf, score)
        score = np.exp(score - score.max(-1, keepdims=True))
        score /= score.sum(-1, keepdims=True)
        h = linear(np.einsum("hqk,khd->qhd", score, w).reshape(n, heads * width), p + "attn_output.weight")
        x = x + normed(h, p + "post_attention_norm.weight")
        h = normed(x, p + "ffn_norm.weight")
        if gguf.weight(p + "ffn_gate.weight") is not None:
            gate, up = linear(h, p + "ffn_gate.weight"), linear(h, p + "ffn_up.weight")
        else:
            gate, up = np.split(linear(h, p + "ffn_up.weight"), 2, axis=1)
        x = x + normed(linear(activation(gate) * up, p + "ffn_down.weight"), p + "post_ffw_norm.weight")
    return capped(linear(normed(x, "output_norm.weight"), "output.weight"), logit_cap)


def centred(x):
    """Logits and log-probabilities differ by a constant per row; this takes it out."""
    x = np.asarray(x, dtype=np.float64)
    return x - x.mean(-1, keepdims=True)


def distance(a, b):
    a, b = centred(a), centred(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
