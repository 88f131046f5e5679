"""Quantising on one core, ours beside ggml's, in turns in one process: million values a second, and the error.

    examples/bench/quantize_ggml.py [--types q4_k,q6_k] [--rounds 5] [--values 1048576]

needs numpy and xllamacpp (tests/requirements.txt), whose library has ggml's own quantisers, and a built build/libunsloth.so.
Time is that of the thread alone. Values are normal, in rows of 4096. The best round counts for each.
"""
import argparse
import ctypes
import pathlib
import time

import numpy as np
import xllamacpp.xllamacpp

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUMBERS = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
           "iq4_nl": 20, "iq4_xs": 23, "iq3_xxs": 18, "iq3_s": 21, "iq2_xxs": 16, "iq2_xs": 17, "iq2_s": 22, "iq1_s": 19, "iq1_m": 29}
EQUAL = "iq2_xxs iq2_xs iq1_s".split()  # ggml wants an importance for these: the same for all values, as ours has without one
COLS = 4096


class Ours:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.ctx = ctypes.c_void_p()
        self.lib.usl_ctx_new(None, ctypes.byref(self.ctx))
        self.lib.usl_quant_bytes.restype = ctypes.c_size_t
        self.lib.usl_quant_bytes.argtypes = [ctypes.c_int, ctypes.c_int64]
        self.lib.usl_quantize.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self.lib.usl_dequantize.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64,
                                            ctypes.c_void_p]

    def bytes(self, number, n):
        return self.lib.usl_quant_bytes(number, n)

    def quantize(self, number, x, out):
        assert self.lib.usl_quantize(self.ctx, number, x.ctypes.data, x.size, out.ctypes.data) == 0

    def decode(self, number, out, n):
        y = np.empty(n, dtype=np.float32)
        assert self.lib.usl_dequantize(self.ctx, number, out.ctypes.data, out.size, n, y.ctypes.data) == 0
        return y


class Ggml:
    def __init__(self):
        self.chunk = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
        self.chunk.restype = ctypes.c_size_t
        self.chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
                               ctypes.c_void_p]
        self.ones, self.equal = np.ones(COLS, dtype=np.float32), [NUMBERS[name] for name in EQUAL]

    def quantize(self, number, x, out):
        importance = self.ones.ctypes.data if number in self.equal else None
        self.chunk(number, x.ctypes.data, out.ctypes.data, 0, x.size // COLS, COLS, importance)


def seconds(quantizer, number, x, out):
    start = time.thread_time()
    quantizer.quantize(number, x, out)
    return time.thread_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default=str(ROOT / "build" / "libunsloth.so"))
    parser.add_argument("--types", default=",".join(NUMBERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--values", type=int, default=1 << 20)
    args = parser.parse_args()
    ours, ggml = Ours(args.library), Ggml()
    x = np.random.default_rng(1).standard_normal(args.values // COLS * COLS).astype(np.float32) * 0.02
    print(f"{'type':8}{'ggml M/s':>10}{'ours M/s':>10}{'times':>7}{'error/ggml':>12}")
    for name in args.types.split(","):
        number = NUMBERS[name]
        out = {q: np.zeros(ours.bytes(number, x.size), dtype=np.uint8) for q in (ours, ggml)}
        best = {ours: 9e9, ggml: 9e9}
        for _ in range(args.rounds):
            for q in (ggml, ours):
                best[q] = min(best[q], seconds(q, number, x, out[q]))
        error = {q: float(np.linalg.norm(ours.decode(number, out[q], x.size) - x)) for q in (ours, ggml)}
        rate = {q: x.size / best[q] / 1e6 for q in (ours, ggml)}
        print(f"{name:8}{rate[ggml]:10.1f}{rate[ours]:10.1f}{rate[ours] / rate[ggml]:7.2f}{error[ours] / error[ggml]:12.4f}", flush=True)


if __name__ == "__main__":
    main()
