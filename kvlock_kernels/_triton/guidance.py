"""guided_velocity: the optimised scale from sums in a fixed order, then everything per element."""

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

BLOCK = 1024  # elements: 8 a thread at four warps, 16 bytes of bf16


@triton.jit
def projection_kernel(cond, uncond, partials, elements, blocks, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Program = one part of one sample: sums c * u and u * u."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    b, part = (program // parts).to(tl.int64), program % parts
    product = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for block in range(part, blocks, parts):
        i = block * BLOCK + tl.arange(0, BLOCK)
        c = tl.load(cond + b * elements + i, mask=i < elements, other=0).to(tl.float32)
        u = tl.load(uncond + b * elements + i, mask=i < elements, other=0).to(tl.float32)
        product += c * u
        square += u * u
    store_one(partials, 2 * b * parts + part, tl.sum(product, 0, keep_dims=True))
    store_one(partials, (2 * b + 1) * parts + part, tl.sum(square, 0, keep_dims=True))


# A table indexed by the step gives sigma and x_scale any alignment, which must not compile the kernel anew.
@triton.jit(do_not_specialize_on_alignment=["sigma", "x_scale"])
def velocity_kernel(
    cond, uncond, guidance_scale, x, sigma, mask, x_scale, partials, velocity, s_star, x0, elements, blocks, parts,
    guidance_stride, sigma_stride, mask_stride, x_scale_stride, period, background, eps,
    GUIDED: tl.constexpr, OPTIMIZED: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):
    """Program = one block of one sample; the first of a sample writes s*. All but the sums is read before it waits."""
    program = tl.program_id(0)
    b, block = (program // blocks).to(tl.int64), program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    at = b * elements + i
    conditional = tl.load(cond + at, mask=inside, other=0)
    c = conditional.to(tl.float32)
    scaled = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        scaled *= load_one(x_scale, b * x_scale_stride)
    noise = load_one(sigma, b * sigma_stride)
    s = tl.full([1], 1.0, tl.float32)
    if GUIDED:
        u = tl.load(uncond + at, mask=inside, other=0).to(tl.float32)
        w = load_one(guidance_scale, b * guidance_stride)
        if MASKED:
            w = tl.where(load_beside(mask, b, i, inside, mask_stride, period) != 0, w, background)
        if OPTIMIZED:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            product, square = add_parts(partials, b, parts, PARTS)
            s = tl.div_rn(product, square + eps)
        v = tl.where(w == 1, c, (1 - w) * s * u + w * c)
        tl.store(velocity + at, tl.where(w == 1, conditional, v.to(conditional.dtype)), mask=inside)
    else:
        v = c
        tl.store(velocity + at, conditional, mask=inside)
    tl.store(x0 + at, scaled - noise * v, mask=inside)
    if block == 0:
        store_one(s_star, b, s)


def guided_velocity(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    mask: Tensor | None = None,
    background_guidance: float | None = None,
    optimized_scale: bool = True,
    x_scale: Tensor | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kvlock_kernels.guided_velocity`."""
    samples = cond.shape[0]
    velocity = cond.new_empty(cond.shape)
    s_star = cond.new_empty(samples, dtype=torch.float32)
    x0 = cond.new_empty(cond.shape, dtype=torch.float32)
    if samples == 0:
        return velocity, s_star, x0
    elements, blocks, parts = Blocks.of(cond, BLOCK)
    cond = cond.contiguous()
    guided, optimized = uncond is not None, uncond is not None and optimized_scale
    other = cond if uncond is None else uncond.contiguous()
    partials = cond.new_empty((samples, 2, parts) if optimized else (0,), dtype=torch.float32)
    early = optimized and starts_early(cond)
    if not guided or background_guidance is None:
        mask = None  # without effect
    inside, mask_stride, period = (cond, 0, 1) if mask is None else beside(mask, cond)
    scale = sigma if x_scale is None else x_scale  # read only where given
    x = x.contiguous()  # a copy must come before the first kernel: the second one reads it before it waits
    if optimized:
        projection_kernel[(samples * parts,)](
            cond, other, partials, elements, blocks, parts, BLOCK=BLOCK, EARLY=early,
            enable_fp_fusion=True,
        )
    velocity_kernel[(samples * blocks,)](
        cond, other, guidance_scale, x, sigma, inside, scale, partials, velocity, s_star, x0,
        elements, blocks, parts, sample_stride(guidance_scale, samples), sample_stride(sigma, samples), mask_stride,
        sample_stride(scale, samples), period, background_guidance or 0.0, eps,
        GUIDED=guided, OPTIMIZED=optimized, MASKED=mask is not None, SCALED=x_scale is not None,
        BLOCK=BLOCK, PARTS=PARTS, EARLY=early, launch_pdl=early,
        enable_fp_fusion=False,  # the reference's roundings, and the same ones with and without a mask
    )
    return velocity, s_star, x0
