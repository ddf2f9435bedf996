"""Compiles the cases of the table with other head dimensions, and prints those that spill, as JSON."""

import dataclasses
import json
from collections.abc import Iterator

from benchmarks import offline
from benchmarks._case import Shape
from kvlock_kernels._triton import in_loop

SHAPES = tuple(Shape(f"d{dim}", (21, 30, 52), 1536 // dim, dim) for dim in (32, 64, 96, 256))


def spilling() -> Iterator[str]:
    for case in offline.OFFLINE:
        for shape in SHAPES:
            if "attention" in case.op and shape.dim > in_loop.MAX_HEAD_DIM:
                continue
            for arch in case.archs:
                for kernel in offline.compile_case(dataclasses.replace(case, shape=shape), arch):
                    if kernel.spills:
                        yield f"{case.name} D{shape.dim} {kernel.kernel} sm_{arch}: {kernel.spills}"


if __name__ == "__main__":
    print(json.dumps(list(spilling())))
