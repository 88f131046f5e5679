"""Writes nf4_reference.bin: what bitsandbytes makes of small random weights and states on the CPU.

Run: python make_nf4_reference.py (needs torch and bitsandbytes; made with bitsandbytes 0.50.2, torch 2.15.0).
With --maps it prints the two dynamic maps of core/quant/dynamic_map.c instead.

Inputs are not stored: value i of a case is made from a 64-bit generator that the test repeats (see `values`).
Layout, little-endian: per map 256 float32, per table 16 float32 (nf4, fp4); then per 4-bit case, in CASES' order,
codes, absmax codes, absmax2 float32, offset float32, then 16 float32 of the decoded weight, spread evenly; then per fp4
case codes and absmax float32; then per 8-bit case codes and absmax float32.
"""

import sys
from pathlib import Path

import bitsandbytes.functional as F
import numpy as np
import torch

# values, scale, seed, zeroed values at the start
CASES = [(64, 1.0, 1, 0), (4096, 0.02, 2, 0), (300, 1e-3, 3, 0), (1001, 50.0, 4, 0), (20032, 1.0, 5, 128),
         (64, 1e-30, 6, 0), (1, 3.0, 7, 0), (130, 1.0, 8, 130)]
FP4_CASES = [(192, 1.0, 9, 0), (77, 0.1, 10, 0)]
MAP_CASES = [(1024, 1.0, 11, 0, True), (700, 1e-4, 12, 256, True), (600, 1e-8, 13, 0, False)]


def values(n, scale, seed, zeros):
    """Sum of four uniforms from a linear congruential generator, times scale; exact in float32 before the scale."""
    state, out = seed, np.empty(n, np.float32)
    for i in range(n):
        total = 0
        for _ in range(4):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            total += state >> 44
        out[i] = np.float32((total - 2**21) / 2**20) * np.float32(scale)
    out[:zeros] = 0
    return torch.from_numpy(out)


def repr_float(x):
    x = np.float32(x)
    if x == 0:
        return "0.0f"
    form = np.format_float_scientific if abs(x) < 1e-3 else np.format_float_positional
    return form(x, unique=True, trim="0") + "f"


def print_maps():
    for name, signed in (("usli_dynamic_map", True), ("usli_dynamic_map_unsigned", False)):
        numbers = [repr_float(x) for x in F.create_dynamic_map(signed=signed)]
        print(f"const float {name}[256] = {{")
        for i in range(0, 256, 4):
            print("    " + ", ".join(numbers[i : i + 4]) + ",")
        print("};\n")


def main():
    parts = [F.create_dynamic_map(), F.create_dynamic_map(signed=False)]
    parts += [F.get_4bit_type(t, device="cpu") for t in ("nf4", "fp4")]
    for case in CASES:
        x = values(*case)
        codes, state = F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
        decoded = F.dequantize_4bit(codes, state).reshape(-1)
        picks = torch.arange(16) * len(x) // 16
        parts += [codes, state.absmax, state.state2.absmax, state.offset, decoded[picks]]
    for case in FP4_CASES:
        codes, state = F.quantize_4bit(values(*case), blocksize=64, compress_statistics=False, quant_type="fp4")
        parts += [codes, state.absmax]
    for n, scale, seed, zeros, signed in MAP_CASES:
        x = values(n, scale, seed, zeros)
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(
            x if signed else x * x, F.create_dynamic_map(signed=signed), 256)
        parts += [codes, absmax]
    with open(Path(__file__).parent / "nf4_reference.bin", "wb") as f:
        for p in parts:
            f.write(p.detach().contiguous().numpy().tobytes())


if __name__ == "__main__":
    print_maps() if "--maps" in sys.argv else main()
