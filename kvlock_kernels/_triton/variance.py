"""windowed_variance_ and lock_schedule: the variance over the ring, and the lock that follows from it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton.blocks import (
    PARTS,
    Blocks,
    add_parts,
    beside,
    load_beside,
    load_one,
    sample_stride,
    starts_early,
    store_one,
)

BLOCK = 512  # elements: 4 a thread at four warps, 16 bytes of each slot; with 8 four programs no longer fit an SM
UNROLLED = tl.constexpr(16)  # slots; more make the compiler slow, and from about 100 on the registers no longer suffice
SCHEDULE_BLOCK = 128  # samples: a thread each


@triton.jit
def squared_deviations(x, at, inside, slot, n, stride_w, W: tl.constexpr):
    """sum_{j < n} (ring[j] - mean)^2 by Welford, with x for slot `slot`; the other slots in use are read once.

    Seen from x, entries near it are exact in fp32, however large mean / std is; equal entries give exactly 0.
    """
    mean = tl.zeros_like(x)
    squares = tl.zeros_like(x)
    if W <= UNROLLED:
        for j in tl.static_range(W):
            mean, squares = welford(x, at + j * stride_w, inside & (j != slot), j < n, 1.0 / (j + 1), mean, squares)
    else:
        for j in range(W):
            share = tl.div_rn(1.0 + tl.zeros([1], tl.float32), (j + 1 + tl.zeros([1], tl.int32)).to(tl.float32))
            mean, squares = welford(x, at + j * stride_w, inside & (j != slot), j < n, share, mean, squares)
    return squares


@triton.jit
def welford(x, at, valid, used, share, mean, squares):
    """One more entry of the ring, at `at`, taken into mean and sum of squares where it is `used`."""
    shifted = tl.load(at, mask=valid & used, other=x) - x
    before = shifted - mean
    mean += tl.where(used, before * share, 0.0)
    squares += tl.where(used, before * (shifted - mean), 0.0)
    return mean, squares


@triton.jit
def ring_kernel(x0, history, step, weight, partials, elements, blocks, parts, stride_w, stride_b, weight_stride, period,
                WEIGHTED: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Program = one part of one sample: writes x0 to the ring and sums w * squared deviations and w."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    b, part = (program // parts).to(tl.int64), program % parts
    stride_w = tl.cast(stride_w, tl.int64)  # slots may lie further apart than int32 can say
    now = load_one(step, 0)
    slot, n = now % W, tl.minimum(now + 1, W)
    weighted = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(part, blocks, parts):
        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < elements
        x = tl.load(x0 + b * elements + i, mask=inside, other=0).to(tl.float32)
        at = history + b * stride_b + i
        squares = squared_deviations(x, at, inside, slot, n, stride_w, W)
        tl.store(at + slot * stride_w, x, mask=inside)  # after the loads, which the compiler keeps behind a store
        w = load_beside(weight, b, i, inside, weight_stride, period) if WEIGHTED else inside.to(tl.float32)
        weighted += tl.where(w == 0, 0.0, w * squares)
        total += w
    store_one(partials, 2 * b * parts + part, tl.sum(weighted, 0, keep_dims=True))
    store_one(partials, (2 * b + 1) * parts + part, tl.sum(total, 0, keep_dims=True))


@triton.jit
def mean_kernel(partials, step, variance, parts, W: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr):
    """Program = one sample: its weighted mean."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.minimum(load_one(step, 0) + 1, W)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    weighted, total = add_parts(partials, b, parts, PARTS)
    mean = tl.div_rn(tl.div_rn(weighted, total), (n - 1).to(tl.float32))
    store_one(variance, b, tl.where((n < 2) | (total == 0), 0.0, mean))


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN, which the maximum of a GPU drops."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def schedule_kernel(variance, guidance_scale, fusion_ratio, guidance, samples, stride, guidance_stride, tau, boost,
                    alpha_min, BLOCK: tl.constexpr):
    b = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = b < samples
    pressure = tl.load(variance + b * stride, mask=valid, other=0.0)
    pressure = tl.div_rn(pressure, tl.full([BLOCK], tau, tl.float32))
    base = tl.load(guidance_scale + b * guidance_stride, mask=valid, other=0.0)
    tl.store(fusion_ratio + b, clamp(pressure, alpha_min, 1.0), mask=valid)
    tl.store(guidance + b, base * clamp(pressure, 1.0, boost), mask=valid)


def windowed_variance_(x0: Tensor, history: Tensor, step: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """See `kvlock_kernels.windowed_variance_`."""
    slots, samples = history.shape[:2]
    variance = history.new_empty(samples)
    if samples == 0:
        return variance
    elements, blocks, parts = Blocks.of(x0, BLOCK)
    weights, weight_stride, period = (history, 0, 1) if weight is None else beside(weight, x0)
    ring = history if history[0, 0].is_contiguous() else history.contiguous()
    partials, early = history.new_empty((samples, 2, parts)), starts_early(history)
    ring_kernel[(samples * parts,)](
        x0.contiguous(), ring, step, weights, partials, elements, blocks, parts, *ring.stride()[:2],
        weight_stride, period, WEIGHTED=weight is not None, W=slots, BLOCK=BLOCK, EARLY=early,
        enable_fp_fusion=True,
    )
    mean_kernel[(samples,)](
        partials, step, variance, parts, W=slots, PARTS=PARTS, EARLY=early, launch_pdl=early,
        enable_fp_fusion=True,
    )
    if ring is not history:
        history.copy_(ring)
    return variance


def lock_schedule(
    variance: Tensor, guidance_scale: Tensor, *, tau: float, boost: float, alpha_min: float
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.lock_schedule`."""
    samples = variance.shape[0]
    fusion_ratio, guidance = torch.empty_like(variance), torch.empty_like(variance)
    if samples == 0:
        return fusion_ratio, guidance
    schedule_kernel[(triton.cdiv(samples, SCHEDULE_BLOCK),)](
        variance, guidance_scale, fusion_ratio, guidance, samples, variance.stride(0),
        sample_stride(guidance_scale, samples), tau, boost, alpha_min, BLOCK=SCHEDULE_BLOCK,
        enable_fp_fusion=True,
    )
    return fusion_ratio, guidance
