"""Writes iquants_reference.bin: what ggml makes of small random weights in its types below four bits.

Run: python make_iquants_reference.py (needs numpy, gguf and xllamacpp; made with gguf 0.19.0, xllamacpp 2026.10.11549).

Layout, little-endian: float32 importance (COLS), float32 values (ROWS, COLS); then per type of TYPES its blocks as ggml's quantiser
makes them with that importance, and a digest (64-bit FNV-1a) of the values that gguf decodes from them, in float32.
"""
import ctypes
import pathlib

import numpy as np
import xllamacpp.xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

TYPES = "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M".split()
ROWS, COLS = 6, 512


def rows(rng):
    """Normal, with heavy tails, uniform, tiny, half of it zero, and with one value far out."""
    x = np.stack([rng.standard_normal(COLS) * 0.02, rng.standard_t(4, COLS) * 0.02, rng.uniform(-1, 1, COLS),
                  rng.standard_normal(COLS) * 1e-3, rng.standard_normal(COLS), rng.standard_normal(COLS)])
    x[4, :COLS // 2] = 0
    x[5, 7] = 20
    return np.ascontiguousarray(x, dtype=np.float32)


def digest(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return np.uint64(h)


def main():
    chunk = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    rng = np.random.default_rng(5)
    x, importance = rows(rng), np.exp(rng.standard_normal(COLS)).astype(np.float32)
    parts = [importance, x]
    for name in TYPES:
        number = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[number]
        out = np.zeros(x.size // block * size, dtype=np.uint8)
        chunk(number, x.ctypes.data, out.ctypes.data, 0, ROWS, COLS, importance.ctypes.data)
        decoded = dequantize(out.reshape(ROWS, -1), number).astype(np.float32)
        parts += [out, digest(decoded.tobytes())]
    with open(pathlib.Path(__file__).parent / "iquants_reference.bin", "wb") as f:
        for part in parts:
            f.write(part.tobytes())


if __name__ == "__main__":
    main()
