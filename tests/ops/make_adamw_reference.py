"""Writes adamw_reference.bin: three updates of bitsandbytes' blockwise 8-bit AdamW on the CPU.

Run: python make_adamw_reference.py (needs torch and bitsandbytes; made with bitsandbytes 0.50.2, torch 2.15.0).

The update is bitsandbytes' own; its states are quantised by the rule of its GPU code and of its portable code, nearest
of value * (1 / absmax), since its CPU code first rounds to a coarser grid (see core/quant/optim8.h).
Inputs are not stored: they come from a 64-bit generator that the test repeats.
Layout, little-endian: float32 w (N); codes of m (N), of v (N); absmax of m, of v, float32 (blocks).
"""

from pathlib import Path

import bitsandbytes.functional as F
import numpy as np
import torch
from bitsandbytes.backends.cpu import ops

N, BLOCK, STEPS = 700, 256, 3
LR, BETA1, BETA2, EPS, DECAY, CLIP = 1e-2, 0.9, 0.999, 1e-8, 0.05, 0.5


def values(n, scale, seed):
    state, out = seed, np.empty(n, np.float32)
    for i in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out[i] = np.float32((state >> 40) - 2**23) * np.float32(scale / 2**23)
    return torch.from_numpy(out)


def quantize(a, code, absmax_out, out, blocksize):
    bounds = (code[:-1] + code[1:]) / 2
    for i in range(0, a.numel(), blocksize):
        block = a[i : i + blocksize]
        absmax = block.abs().max()
        absmax_out[i // blocksize] = absmax
        out[i : i + blocksize] = torch.bucketize(block * (1.0 / absmax), bounds).to(torch.uint8)


def main():
    ops._quant_blockwise_fp32_direct = quantize
    blocks = (N + BLOCK - 1) // BLOCK
    w = values(N, 1.0, 1)
    m, v = torch.zeros(N, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8)
    m_absmax, v_absmax = torch.zeros(blocks), torch.zeros(blocks)
    signed, unsigned = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
    for step in range(1, STEPS + 1):
        g = values(N, 0.1 * step, 100 + step)
        ops._optimizer_update_8bit_blockwise_cpu("adam", g, w, m, v, BETA1, BETA2, 0.0, 0.0, EPS, step, LR, signed, unsigned,
                                                 m_absmax, v_absmax, DECAY, CLIP)
    parts = [w, m, v, m_absmax, v_absmax]
    Path(__file__).with_name("adamw_reference.bin").write_bytes(b"".join(p.numpy().tobytes() for p in parts))


main()
