"""qk_norm_rope_kv_lerp_ and qk_norm_rope_kv_pack_: QK norm, RoPE and the lock in one pass over the projections."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton import Unsupported
from kvlock_kernels._triton.packing import encodes_e4m3, store_packed
from kvlock_kernels._triton.tiles import (
    MAX_HEAD_DIM,
    PACKINGS,
    as_bytes,
    dense,
    lerp,
    load_source,
    source_options,
    source_pointers,
)

MAX_TOKEN = 8192  # elements of a token that stay in registers: 16 a thread at sixteen warps
SMALL_TOKEN = 1024  # a tile of several tokens is no larger than this
A_THREAD = tl.constexpr(8)  # elements side by side: 16 bytes of bf16
A_WARP = 32 * A_THREAD.value


@triton.jit
def rms_norm(x, weight, at, inner, C: tl.constexpr, eps):
    """Normalises each token of the tile x [TOKENS, HEADS, DIM] over all its heads, in fp32."""
    x = x.to(tl.float32)
    squares = tl.sum(tl.sum(x * x, axis=2, keep_dims=True), axis=1, keep_dims=True)
    w = tl.load(weight + at, mask=inner, other=0.0).to(tl.float32)
    return x * tl.rsqrt(squares / C + eps) * w


@triton.jit
def load_pairs(angles, token, d, known, D: tl.constexpr):
    """The even and the odd columns, [TOKENS, 1, DIM / 2] fp32 each."""
    TOKENS: tl.constexpr = token.shape[0]
    HALF: tl.constexpr = d.shape[2] // 2
    values = tl.load(angles + token * D + d, mask=known & (d < D), other=0.0).to(tl.float32)
    return tl.split(tl.reshape(values, [TOKENS, 1, HALF, 2]))


@triton.jit
def load_angles(cos, sin, token, d, known, D: tl.constexpr):
    """One number of each pair: cosines have it in the even columns, sines in the odd ones."""
    c, _ = load_pairs(cos, token, d, known, D)
    _, s = load_pairs(sin, token, d, known, D)
    return c, s


@triton.jit
def rope(x, cos, sin):
    """Rotates the pairs of the tile x [TOKENS, HEADS, DIM]."""
    HALF: tl.constexpr = x.shape[2] // 2
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], HALF, 2]))
    rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(rotated, x.shape)


@triton.jit
def locking(ratio, b, row, RECORD: tl.constexpr):
    """The ratio, and which tokens of the tile are packed or mix."""
    locks = row >= 0
    a = tl.zeros([1, 1, 1], tl.float32)
    if not RECORD:
        a = tl.load(ratio + b + tl.zeros([1, 1, 1], tl.int64))
        locks = locks & ((a > 0) | (a != a))
    return a, locks


@triton.jit
def lock_values(
    v_at, v_rows, v_scale, v_mean, row, head, d, valid, locks, rows, a, b,
    RECORD: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    PACKING: tl.constexpr, SHARED: tl.constexpr, MEANS: tl.constexpr, NATIVE: tl.constexpr,
):
    """Packs or mixes the values, which need neither norm nor rotation."""
    if RECORD:
        x = tl.load(v_at, mask=valid & locks, other=0.0)
        x = x if PACKING == 0 else x.to(tl.float32)
        to = (b * rows + row) * H + head
        store_packed(x, v_rows, v_scale, to, d, locks & (head < H), valid & locks, D, PACKING, NATIVE)
    else:
        source = load_source(v_rows, v_scale, v_mean, row, head, d, valid & locks, locks & (head < H), rows,
                             0 if SHARED else b, b if MEANS > 1 else 0, H, D, PACKING, MEANS > 0)
        x = tl.load(v_at, mask=valid & locks & ((a < 1) | (a != a)))
        tl.store(v_at, lerp(x, source, a), mask=valid & locks)


@triton.jit
def norm_rope_kernel(
    q, k, v, q_weight, k_weight, cos, sin, source_row, ratio, tokens, samples, rows, eps,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, v_stride_b, v_stride_n,
    k_rows, k_scale, k_mean, v_rows, v_scale, v_mean,
    RECORD: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    K_PACKING: tl.constexpr, K_SHARED: tl.constexpr, K_MEANS: tl.constexpr,
    V_PACKING: tl.constexpr, V_SHARED: tl.constexpr, V_MEANS: tl.constexpr, NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):
    """Program = TOKENS tokens of one sample with all their heads. RECORD writes the source rows, otherwise they mix."""
    program = tl.program_id(0)
    b = (program % samples).to(tl.int64)  # neighbours share angles and source rows in the cache
    token = ((program // samples).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    # Without the hint rows in 8 bits come 16 elements a thread, which shared memory then brings to those of the tokens.
    d = tl.max_contiguous(tl.arange(0, DIM), min(A_THREAD, DIM))[None, None, :]
    head = tl.arange(0, HEADS)[None, :, None]
    known, inner = token < tokens, (head < H) & (d < D)
    valid, at = known & inner, head * D + d
    # Values in 8 bits come before the angles, which stay in registers: so two tokens of 40 heads fit a multiprocessor
    # (where keys alone have a mean), and one of 12 takes 40 registers a thread, not 48 or 52. Values in bf16 come last:
    # before the angles the pass took 224 us for 215 on an H200 with 32760 tokens of 12 heads.
    EARLY: tl.constexpr = V_PACKING != 0
    if not EARLY:
        c, s = load_angles(cos, sin, token, d, known, D)
    row = tl.load(source_row + token, mask=known, other=-1).to(tl.int64)
    row = tl.where(row < rows, row, -1)  # without rows nothing mixes
    v_at = v + b * v_stride_b + token * v_stride_n + at
    if EARLY:
        a, locks = locking(ratio, b, row, RECORD)
        lock_values(v_at, v_rows, v_scale, v_mean, row, head, d, valid, locks, rows, a, b,
                    RECORD, H, D, V_PACKING, V_SHARED, V_MEANS, NATIVE)
        c, s = load_angles(cos, sin, token, d, known, D)

    q_at = q + b * q_stride_b + token * q_stride_n + at
    new = rms_norm(tl.load(q_at, mask=valid, other=0.0), q_weight, at, inner, H * D, eps)
    tl.store(q_at, rope(new, c, s).to(q.dtype.element_ty), mask=valid)

    k_at = k + b * k_stride_b + token * k_stride_n + at
    new = rms_norm(tl.load(k_at, mask=valid, other=0.0), k_weight, at, inner, H * D, eps)
    if not EARLY:
        a, locks = locking(ratio, b, row, RECORD)
    if RECORD:
        to = (b * rows + row) * H + head
        store_packed(new, k_rows, k_scale, to, d, locks & (head < H), valid & locks, D, K_PACKING, NATIVE)
    else:
        source = load_source(k_rows, k_scale, k_mean, row, head, d, valid & locks, locks & (head < H), rows,
                             0 if K_SHARED else b, b if K_MEANS > 1 else 0, H, D, K_PACKING, K_MEANS > 0)
        new = tl.where(locks, lerp(new, source, a), new)
    if not EARLY:
        lock_values(v_at, v_rows, v_scale, v_mean, row, head, d, valid, locks, rows, a, b,
                    RECORD, H, D, V_PACKING, V_SHARED, V_MEANS, NATIVE)
    tl.store(k_at, rope(new, c, s).to(k.dtype.element_ty), mask=valid)


def qk_norm_rope_kv_lerp_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_source: Tensor,
    v_source: Tensor,
    source_row: Tensor,
    ratio: Tensor,
    *,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> None:
    """See `kvlock_kernels.qk_norm_rope_kv_lerp_`."""
    launch(
        (q, k, v, q_weight, k_weight, cos, sin, source_row),
        dense(ratio, ratio),
        k_source.shape[1],
        eps,
        (*source_pointers(k_source, k_scale, k_mean), *source_pointers(v_source, v_scale, v_mean)),
        RECORD=False,
        NATIVE=False,
        **source_options(k_source, k_mean, "K_"),
        **source_options(v_source, v_mean, "V_"),
    )


def qk_norm_rope_kv_pack_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    source_row: Tensor,
    rows: int,
    dtype: torch.dtype,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kvlock_kernels.qk_norm_rope_kv_pack_`."""
    b, d, packing = k.shape[0], cos.shape[1], PACKINGS.get(dtype, 0)
    shape = (b, rows, k.shape[2] // d, d)
    scale_shape = shape[:3] if packing else (0,)
    k_data, v_data = (k.new_empty(shape, dtype=dtype) for _ in range(2))
    k_scale, v_scale = (k.new_empty(scale_shape, dtype=torch.float32) for _ in range(2))
    launch(
        (q, k, v, q_weight, k_weight, cos, sin, source_row),
        k_scale,
        rows,
        eps,
        (as_bytes(k_data), k_scale, k_scale, as_bytes(v_data), v_scale, v_scale),
        RECORD=True,
        K_PACKING=packing,
        K_SHARED=False,
        K_MEANS=0,
        V_PACKING=packing,
        V_SHARED=False,
        V_MEANS=0,
        NATIVE=encodes_e4m3(k),
    )
    return k_data, k_scale, v_data, v_scale


def launch(
    projections: tuple[Tensor, ...], ratio: Tensor, rows: int, eps: float, sources: tuple[Tensor, ...], **options: Any
) -> None:
    """Tiles all tokens of all samples; tokens that are small share a tile."""
    q, k, v, q_weight, k_weight, cos, sin, source_row = projections
    (b, n, c), d = q.shape, cos.shape[1]
    if q.numel() == 0:
        return
    heads, dim = triton.next_power_of_2(c // d), triton.next_power_of_2(d)
    if d > MAX_HEAD_DIM:
        raise Unsupported(f"head dimension {d}; the kernel takes at most {MAX_HEAD_DIM}")
    if heads * dim > MAX_TOKEN:
        raise Unsupported(f"{c // d} heads of dimension {d}; the kernel takes at most {MAX_TOKEN} elements a token")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise Unsupported("projections whose channels are not side by side in memory")
    together = max(1, min(SMALL_TOKEN // (heads * dim), triton.next_power_of_2(n)))
    grid = (triton.cdiv(n, together) * b,)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    small = [t.contiguous() for t in (q_weight, k_weight, cos, sin, source_row)]
    norm_rope_kernel[grid](
        q, k, v, *small, ratio, n, b, rows, eps, *strides, *sources,
        **options, H=c // d, D=d, TOKENS=together, HEADS=heads, DIM=dim,
        num_warps=min(max(heads * dim // A_WARP, 4), 16),
        enable_fp_fusion=False,  # packed rows have the bits of pack_kv
    )
