"""Writes randperm.json: permutations of torch.randperm on the CPU, which decide the order of training rows.

Run: python make_randperm.py (needs torch; made with torch 2.15.0).
"""

import json
from pathlib import Path

import torch

CASES = [(0, 1), (0, 2), (1, 7), (42, 33), (3407, 50), (3408, 50), (3409, 50), (4294967295, 100), (123456789, 700)]


def case(seed, n):
    generator = torch.Generator()
    generator.manual_seed(seed)
    return {"seed": seed, "order": torch.randperm(n, generator=generator).tolist()}


lines = ",\n".join(json.dumps(case(seed, n)) for seed, n in CASES)
Path(__file__).with_name("randperm.json").write_text(f"[\n{lines}\n]\n")
