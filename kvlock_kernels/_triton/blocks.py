"""Samples [B, ...] cut into blocks of elements, with what is broadcast beside them and sums in a fixed order."""

from math import prod
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton import Unsupported

EARLY_ARCH = 90  # compute capability from which a kernel can start under the one before it
PARTS = 512  # most programs that share a sample's sum: about four on each SM, and few enough to add up in one load


class Blocks(NamedTuple):
    """How the elements of a sample are cut; a part takes every `parts`-th block and leaves one partial sum."""

    elements: int
    blocks: int
    parts: int

    @classmethod
    def of(cls, x: Tensor, size: int) -> "Blocks":
        """The cut of x [B, ...] into blocks of `size`; an empty sample has one, in which nothing is valid.

        Raises:
            Unsupported: the elements of a sample cannot be numbered in int32.
        """
        elements = prod(x.shape[1:])
        if elements > 2**31 - size:
            raise Unsupported(f"{elements} elements a sample; the kernels number them in 32 bits")
        blocks = max(triton.cdiv(elements, size), 1)
        return cls(elements, blocks, min(triton.cdiv(blocks, 2), PARTS))


def beside(value: Tensor, x: Tensor) -> tuple[Tensor, int, int]:
    """What kernels read of `value`, broadcastable to x [B, ...]: a contiguous tensor, its sample stride, its period.

    Element i of sample b reads number b * stride + i % period. A value that is shaped as the last axes of x, with or
    without the samples, is taken as it is; another broadcast is written out once for all samples or for each.
    """
    value = value.reshape(*[1] * (x.ndim - value.ndim), *value.shape)
    inner = value.shape[1:]
    ones = next((axis for axis, size in enumerate(inner) if size != 1), len(inner))
    if inner[ones:] != x.shape[1 + ones :]:
        value = value.expand(-1, *x.shape[1:])
    period = prod(value.shape[1:])
    return value.contiguous(), period if value.shape[0] > 1 else 0, max(period, 1)


def sample_stride(value: Tensor, samples: int) -> int:
    """How far apart the numbers of two samples lie in `value`, [] or [B]."""
    return value.expand(samples).stride(0)


def starts_early(x: Tensor) -> bool:
    """Whether a kernel on the device of x can start while the one before it ends.

    It may read what that one does not write, and has to wait before it reads the rest. Every program waits, so that a
    third kernel cannot start before the first is over.
    """
    return not x.is_cpu and triton.runtime.driver.active.get_current_target().arch >= EARLY_ARCH


@triton.jit
def load_beside(value, b, i, valid, stride, period):
    """What lies beside elements i of sample b, in fp32; 0 outside the sample."""
    return tl.load(value + b * stride + i % period, mask=valid, other=0).to(tl.float32)


@triton.jit
def load_one(value, at):
    """One number as a block of one element, which a comparison can combine with other blocks."""
    return tl.load(value + at + tl.zeros([1], tl.int64))


@triton.jit
def store_one(value, at, number):
    tl.store(value + at + tl.zeros([1], tl.int64), number)


@triton.jit
def add_parts(partials, b, parts, PARTS: tl.constexpr):
    """The two sums of sample b from partials [B, 2, parts], in the same order every time: blocks of one element."""
    part = tl.arange(0, PARTS)
    first = partials + 2 * b * parts + part
    one = tl.load(first, mask=part < parts, other=0.0)
    other = tl.load(first + parts, mask=part < parts, other=0.0)  # both on their way before either is added up
    return tl.sum(one, 0, keep_dims=True), tl.sum(other, 0, keep_dims=True)
