"""Compiles the attention for sm_90 as its launcher calls it, and prints what the machine code holds, as JSON."""

import json
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.experimental.gluon import language as gl

from benchmarks import offline
from benchmarks._machine_code import Instruction, disassembled
from kvlock_kernels._triton import hopper, plain

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [  # M, N, D, dtype
    (1, 1, 64, FP16),
    (4096, 4096, 128, BF16),
    (4096, 4000, 128, BF16),
    (4096, 4000, 128, FP16),
    (4096, 4000, 96, BF16),
    (4096, 4000, 64, BF16),
]


def launched(m: int, n: int, d: int, dtype: torch.dtype) -> Any:
    """The kernel of one call."""
    q, k, v = (torch.empty(1, rows, min(rows, 12), d, dtype=dtype, device="meta") for rows in (m, n, n))
    with offline.compiling_for(90) as kernels:
        hopper.attention(q, k, v, scale=d**-0.5, return_lse=True)
    return kernels[0]


def found_out_by(m: int, n: int, d: int, dtype: torch.dtype) -> bool:
    """Whether the call that finds out if Triton compiles the kernel compiles the one that this call runs."""
    q, k, v = (torch.empty(1, rows, 12, d, dtype=dtype, device="meta") for rows in (m, n, n))
    with offline.compiling_for(90) as kernels:
        hopper.compile_for(dtype, 12, d)
        hopper.attention(q, k, v, scale=d**-0.5, return_lse=False)
    first, second = kernels
    return first is second


def warned_without(name: str) -> str:
    """The warning where Gluon has no such name; what was compiled before is out of reach."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton.knobs.cache, "dir", folder),
        mock.patch.dict(vars(gl)),
        offline.compiling_for(90),
        warnings.catch_warnings(record=True) as caught,
    ):
        del vars(gl)[name]
        assert plain.compiled_hopper(BF16, 16, 128) is None
    return str(caught[0].message)


def inspected(case: tuple[Any, ...], kernel: Any, code: list[Instruction]) -> dict[str, Any]:
    opcodes = [one.opcode.split(".")[0] for one in code]
    return {
        "case": "M{}-N{}-D{}-{}".format(*case),
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "spills": opcodes.count("LDL") + opcodes.count("STL"),
        "hgmma": opcodes.count("HGMMA"),
        "overlaps": list(overlaps("\n".join(one.opcode + one.operands for one in code))),
    }


def overlaps(code: str) -> Iterator[int]:
    """Exponentials between a wait that leaves one group of products in flight and the next that leaves none."""
    for section in code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1:]:
        yield section.split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0].count("MUFU.EX2")


if __name__ == "__main__":
    kernels = [launched(*case) for case in CASES]
    found = [*map(inspected, CASES, kernels, disassembled(kernels))]
    same, warned = found_out_by(32760, 32000, 128, BF16), warned_without("warp_specialize")
    print(json.dumps({"kernels": found, "found out by the same kernel": same, "without a name": warned}))
