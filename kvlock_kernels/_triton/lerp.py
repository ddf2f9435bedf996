"""kv_lerp_ and kv_lerp_pair_: source rows mixed into rows of keys and values, in place."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton.tiles import (
    LAUNCH,
    PACKED_TILE,
    PACKINGS,
    TILE,
    Tiling,
    dense,
    lerp,
    load_source,
    source_options,
    source_pointers,
    tile_of,
    with_heads,
)


@triton.jit
def lerp_rows(x, source, scale, mean, index, ratio, rows, samples, block, stride_b, stride_n, stride_h, stride_d,
              SHARED: tl.constexpr, MEANS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PACKING: tl.constexpr,
              TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Mixes one tile of one sample. At ratio 0 nothing moves, at ratio 1 x is not read."""
    b = (block % samples).to(tl.int64)  # neighbours share a source tile in the cache
    row, head, d = tile_of(block // samples, H, TOKENS, HEADS, DIM)
    valid = (row < rows) & (d < D)
    a = tl.load(ratio + b + tl.zeros([1, 1, 1], tl.int64))
    mixes = (a > 0) | (a != a)  # a NaN ratio spreads
    token = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)
    at = x + b * stride_b + token * stride_n + head * stride_h + d * stride_d
    old = tl.load(at, mask=valid & mixes & ((a < 1) | (a != a)))  # first: packed rows change threads at a barrier
    s = load_source(source, scale, mean, row, head, d, valid & mixes, mixes & (row < rows), rows,
                    0 if SHARED else b, b if MEANS > 1 else 0, H, D, PACKING, MEANS > 0)
    tl.store(at, lerp(old, s, a), mask=valid & mixes)


@triton.jit
def lerp_kernel(x, source, scale, mean, index, ratio, rows, samples, stride_b, stride_n, stride_h, stride_d,
                SHARED: tl.constexpr, MEANS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PACKING: tl.constexpr,
                TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """One tensor: program = one tile of one sample."""
    lerp_rows(x, source, scale, mean, index, ratio, rows, samples, tl.program_id(0), stride_b, stride_n, stride_h,
              stride_d, SHARED, MEANS, H, D, PACKING, TOKENS, HEADS, DIM)


@triton.jit
def lerp_pair_kernel(
    k, k_source, k_scale, k_mean, k_stride_b, k_stride_n, k_stride_h, k_stride_d,
    v, v_source, v_scale, v_mean, v_stride_b, v_stride_n, v_stride_h, v_stride_d,
    index, ratio, rows, samples, k_programs,
    K_SHARED: tl.constexpr, K_MEANS: tl.constexpr, K_H: tl.constexpr, K_D: tl.constexpr, K_PACKING: tl.constexpr,
    K_TOKENS: tl.constexpr, K_HEADS: tl.constexpr, K_DIM: tl.constexpr,
    V_SHARED: tl.constexpr, V_MEANS: tl.constexpr, V_H: tl.constexpr, V_D: tl.constexpr, V_PACKING: tl.constexpr,
    V_TOKENS: tl.constexpr, V_HEADS: tl.constexpr, V_DIM: tl.constexpr,
):
    """Keys and values in one launch: the first k_programs programs take keys."""
    program = tl.program_id(0)
    if program < k_programs:
        lerp_rows(k, k_source, k_scale, k_mean, index, ratio, rows, samples, program, k_stride_b, k_stride_n,
                  k_stride_h, k_stride_d, K_SHARED, K_MEANS, K_H, K_D, K_PACKING, K_TOKENS, K_HEADS, K_DIM)
    else:
        lerp_rows(v, v_source, v_scale, v_mean, index, ratio, rows, samples, program - k_programs, v_stride_b,
                  v_stride_n, v_stride_h, v_stride_d, V_SHARED, V_MEANS, V_H, V_D, V_PACKING, V_TOKENS, V_HEADS, V_DIM)


def kv_lerp_(
    x: Tensor,
    source: Tensor,
    index: Tensor,
    ratio: Tensor,
    *,
    source_scale: Tensor | None = None,
    source_mean: Tensor | None = None,
) -> None:
    """See `kvlock_kernels.kv_lerp_`."""
    rows, samples = index.shape[0], x.shape[0]
    if x.numel() == 0 or rows == 0:
        return
    pointers, strides, options, tiling = operand(x, source, source_scale, source_mean)
    common = (dense(index, index), dense(ratio, ratio), rows, samples)
    lerp_kernel[(tiling.blocks * samples,)](*pointers, *common, *strides, **options, **LAUNCH)


def kv_lerp_pair_(
    k: Tensor,
    v: Tensor,
    k_source: Tensor,
    v_source: Tensor,
    index: Tensor,
    ratio: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> None:
    """See `kvlock_kernels.kv_lerp_pair_`."""
    rows, samples = index.shape[0], k.shape[0]
    if k.numel() == 0 or v.numel() == 0 or rows == 0:
        kv_lerp_(k, k_source, index, ratio, source_scale=k_scale, source_mean=k_mean)
        kv_lerp_(v, v_source, index, ratio, source_scale=v_scale, source_mean=v_mean)
        return
    k_pointers, k_strides, k_options, k_tiling = operand(k, k_source, k_scale, k_mean)
    v_pointers, v_strides, v_options, v_tiling = operand(v, v_source, v_scale, v_mean)
    k_programs, v_programs = k_tiling.blocks * samples, v_tiling.blocks * samples
    common = (dense(index, index), dense(ratio, ratio), rows, samples, k_programs)
    options = {f"K_{name}": value for name, value in k_options.items()}
    options |= {f"V_{name}": value for name, value in v_options.items()}
    grid = (k_programs + v_programs,)
    lerp_pair_kernel[grid](*k_pointers, *k_strides, *v_pointers, *v_strides, *common, **options, **LAUNCH)


def operand(
    x: Tensor, source: Tensor, scale: Tensor | None, mean: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any], Tiling]:
    """One tensor with its source rows as the kernels take them: pointers, strides of x, constexprs and tiling."""
    x = with_heads(x, like=source)
    heads, dim = x.shape[2:]
    tiling = Tiling.of(source.shape[1], heads, dim, PACKED_TILE if source.dtype in PACKINGS else TILE)
    tile = {"H": heads, "D": dim, "TOKENS": tiling.tokens, "HEADS": tiling.heads, "DIM": tiling.dim}
    pointers = (x, *source_pointers(source, scale, mean))
    return pointers, x.stride(), source_options(source, mean) | tile, tiling
