"""Compiles what the table of compiled kernels leaves out, and prints the kernels as JSON; with "dims" more of it."""

import dataclasses
import json
import sys
from collections.abc import Iterator

import torch

from benchmarks import offline
from benchmarks.__main__ import CASES
from benchmarks._case import WAN_1_3B_480P, WAN_14B_480P, Case, Inputs, Shape
from kvlock_kernels._triton import in_loop


def found(op: str, shape: Shape, source: str) -> Case:
    return next(case for case in CASES if (case.op, case.shape, case.source) == (op, shape, source))


def with_heads_of(dim: int, case: Case) -> Case:
    """The case with as many channels, cut into heads of `dim`."""
    return dataclasses.replace(case, shape=Shape(f"d{dim}", (21, 30, 52), 1536 // dim, dim))


def of_fp32(case: Case) -> Case:
    """The case with arguments of fp32 where they are of bf16."""

    def make(*args: object) -> Inputs:
        inputs = case.make(*args)
        return {name: x.float() if getattr(x, "dtype", None) == torch.bfloat16 else x for name, x in inputs.items()}

    return dataclasses.replace(case, dtype="fp32", make=make)


def few() -> Iterator[Case]:
    """x of fp32, e4m3 rows under the largest tile, and other heads, for the architecture with least shared memory."""
    lerp, norm_lerp, norm_pack = "kv_lerp_", "qk_norm_rope_kv_lerp_", "qk_norm_rope_kv_pack_"
    others = (
        of_fp32(found(lerp, WAN_1_3B_480P, "bf16")),
        of_fp32(found(lerp, WAN_1_3B_480P, "int8")),
        of_fp32(found(norm_lerp, WAN_14B_480P, "int8")),
        found(norm_lerp, WAN_14B_480P, "e4m3"),
    )
    ops = (lerp, "kv_lerp_pair_", "pack_kv", "unpack_kv", norm_lerp, norm_pack)
    narrow = (with_heads_of(64, found(op, WAN_1_3B_480P, "e4m3")) for op in ops)
    wide = (with_heads_of(dim, found(norm_lerp, WAN_1_3B_480P, "e4m3")) for dim in (96, 256))
    for case in (*others, *narrow, *wide):
        yield dataclasses.replace(case, archs=(89,))
    # sm_80 has no instruction that encodes e4m3.
    yield dataclasses.replace(found(norm_pack, WAN_14B_480P, "e4m3"), archs=(80, 89))


def at_other_dims() -> Iterator[Case]:
    """Every case of the table with heads of other widths than 128."""
    for case in offline.OFFLINE:
        for dim in (32, 64, 96, 256):
            if "attention" not in case.op or dim <= in_loop.MAX_HEAD_DIM:
                yield with_heads_of(dim, case)


if __name__ == "__main__":
    cases = at_other_dims() if "dims" in sys.argv else few()
    kernels = [
        kernel._asdict() | {"case": f"{case.name} {case.dtype} D{case.shape.dim}"}
        for case, kernel in offline.compile_cases(cases)
    ]
    print(json.dumps(kernels))
