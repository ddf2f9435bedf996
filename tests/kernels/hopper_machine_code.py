"""Compiles the attention for sm_90 as its launcher calls it, and prints what the machine code holds, as JSON."""

import json
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import offline
from kvlock_kernels._triton import hopper

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [  # M, N, D, dtype
    (1, 1, 64, FP16),
    (4096, 4096, 128, BF16),
    (4096, 4000, 128, BF16),
    (4096, 4000, 128, FP16),
    (4096, 4000, 96, BF16),
    (4096, 4000, 64, BF16),
]


def compiled(m: int, n: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    q, k, v = (torch.empty(1, rows, min(rows, 12), d, dtype=dtype, device="meta") for rows in (m, n, n))
    with offline.compiling_for(90) as kernels:
        hopper.attention(q, k, v, scale=d**-0.5, return_lse=True)
    code = offline.disassembled(kernels[0])
    opcodes = [opcode.split(".")[0] for opcode in offline.INSTRUCTION.findall(code)]
    return {
        "case": f"M{m}-N{n}-D{d}-{dtype}",
        "warps": kernels[0].metadata.num_warps,
        "shared": kernels[0].metadata.shared,
        "spills": opcodes.count("LDL") + opcodes.count("STL"),
        "hgmma": opcodes.count("HGMMA"),
        "overlaps": list(overlaps(code)),
    }


def overlaps(code: str) -> Iterator[int]:
    """Exponentials between a wait that leaves one group of products in flight and the next that leaves none."""
    for section in code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1:]:
        yield section.split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0].count("MUFU.EX2")


if __name__ == "__main__":
    print(json.dumps([compiled(*case) for case in CASES]))
