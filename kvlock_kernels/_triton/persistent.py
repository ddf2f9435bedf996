"""Attention in one launch that mixes the keys and values of head h + 1 while head h is attended to.

Another way to do what `kv_lerp_attention_` does, for comparison: no operator launches it, see `attend`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton.in_loop import LOG2_E, attend_tile, checked, precision, strides, tiling
from kvlock_kernels._triton.tiles import lerp, load_source, source_options, source_pointers

TOKENS = 64  # keys of a tile: a seventh to a quarter fewer instructions a key than with 32
ROWS = 16  # source rows of one head that a program mixes at once: 8 elements a thread at D = 128


@triton.jit
def mix_rows(x, source, scale, mean, index, ratio, first, end, rows, b, head, stride_b, stride_n, stride_h,
             H: tl.constexpr, D: tl.constexpr, PACKING: tl.constexpr, SHARED: tl.constexpr, MEANS: tl.constexpr,
             ROWS: tl.constexpr, DIM: tl.constexpr):
    """Mixes source rows first..end of one head of sample b into x, in place."""
    d = tl.arange(0, DIM)[None, :]
    a = tl.load(ratio + b + tl.zeros([1, 1], tl.int64))
    for start in range(first, end, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mixes = (row < end) & ((a > 0) | (a != a))  # a NaN ratio spreads
        token = tl.load(index + row, mask=row < end, other=0).to(tl.int64)
        s = load_source(source, scale, mean, row, head, d, mixes & (d < D), mixes, rows, 0 if SHARED else b,
                        b if MEANS > 1 else 0, H, D, PACKING, MEANS > 0)
        at = x + b * stride_b + token * stride_n + head * stride_h + d
        old = tl.load(at, mask=mixes & (d < D) & ((a < 1) | (a != a)), other=0.0)
        tl.store(at, lerp(old, s, a), mask=mixes & (d < D))


@triton.jit
def persistent_kernel(
    q, k, v, out, k_source, k_scale, k_mean, v_source, v_scale, v_mean, index, ratio, counters, m, n, rows, heads,
    qk_scale, q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n,
    v_stride_h, PRECISION: tl.constexpr, H: tl.constexpr, D: tl.constexpr, K_PACKING: tl.constexpr,
    K_SHARED: tl.constexpr, K_MEANS: tl.constexpr, V_PACKING: tl.constexpr, V_SHARED: tl.constexpr,
    V_MEANS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):
    """Program = every programs-th tile of queries of all `heads` heads of all samples, in order of the heads.

    Before its first tile of a head each program mixes its share of the rows of the heads up to the next one, and counts
    itself in. A head is attended to once all programs are counted, which all get to: a program waits only for heads
    whose share it has mixed itself, and the one furthest behind never waits. All must be resident at once.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(m, QUERIES)
    share = tl.cdiv(rows, programs)
    first, end = tl.minimum(program * share, rows), tl.minimum((program + 1) * share, rows)
    done = 0  # heads whose share is mixed
    for number in range(program, tiles * heads, programs):
        at = number // tiles
        while done < tl.minimum(at + 2, heads):
            mix_and_count(k, v, k_source, k_scale, k_mean, v_source, v_scale, v_mean, index, ratio, counters, done,
                          first, end, rows, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
                          H, D, K_PACKING, K_SHARED, K_MEANS, V_PACKING, V_SHARED, V_MEANS, ROWS, DIM)
            done += 1
        while tl.atomic_add(counters + at, 0, sem="acquire") < programs:
            pass
        b, head = (at // H).to(tl.int64), (at % H).to(tl.int64)
        attend_tile(q, k, v, out, out, k_source, k_scale, k_mean, v_source, v_scale, v_mean, index, ratio, m, n, rows,
                    qk_scale, q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b,
                    v_stride_n, v_stride_h, number % tiles, b, head, False, False, PRECISION, H, D, 0, False, 0, 0,
                    False, 0, QUERIES, TOKENS, DIM)
    while done < heads:
        mix_and_count(k, v, k_source, k_scale, k_mean, v_source, v_scale, v_mean, index, ratio, counters, done,
                      first, end, rows, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
                      H, D, K_PACKING, K_SHARED, K_MEANS, V_PACKING, V_SHARED, V_MEANS, ROWS, DIM)
        done += 1


@triton.jit
def mix_and_count(
    k, v, k_source, k_scale, k_mean, v_source, v_scale, v_mean, index, ratio, counters, at, first, end, rows,
    k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h, H: tl.constexpr, D: tl.constexpr,
    K_PACKING: tl.constexpr, K_SHARED: tl.constexpr, K_MEANS: tl.constexpr, V_PACKING: tl.constexpr,
    V_SHARED: tl.constexpr, V_MEANS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):
    """This program's share of head number `at` of all samples' heads; the count makes the writes seen."""
    b, head = tl.cast(at // H, tl.int64), tl.cast(at % H, tl.int64)
    mix_rows(k, k_source, k_scale, k_mean, index, ratio, first, end, rows, b, head, k_stride_b, k_stride_n, k_stride_h,
             H, D, K_PACKING, K_SHARED, K_MEANS, ROWS, DIM)
    mix_rows(v, v_source, v_scale, v_mean, index, ratio, first, end, rows, b, head, v_stride_b, v_stride_n, v_stride_h,
             H, D, V_PACKING, V_SHARED, V_MEANS, ROWS, DIM)
    tl.debug_barrier()  # the writes of all threads come before the count of one
    tl.atomic_add(counters + at, 1, sem="release")


def attend_persistently_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_source: Tensor,
    v_source: Tensor,
    index: Tensor,
    ratio: Tensor,
    *,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> Tensor:
    """See `kvlock_kernels.kv_lerp_attention_`: one launch that mixes k and v in place and waits within itself.

    Raises:
        Unsupported: as `in_loop.checked`.
    """
    q, k, v = checked(q, k, v, scale)
    b, m, h, d = q.shape
    out = q.new_empty(q.shape)
    if q.numel() == 0:
        return out
    tokens = TOKENS if d == triton.next_power_of_2(d) else TOKENS // 2  # the masks of a padded tile take registers too
    persistent_kernel[(resident_programs(q.device),)](
        q, k, v, out, *source_pointers(k_source, k_scale, k_mean), *source_pointers(v_source, v_scale, v_mean),
        index.contiguous(), ratio.contiguous(), q.new_zeros(b * h, dtype=torch.int32), m, k.shape[1], index.shape[0],
        b * h, scale * LOG2_E, *strides(q, k, v), PRECISION=precision(q), H=h, D=d,
        **source_options(k_source, k_mean, "K_"), **source_options(v_source, v_mean, "V_"),
        ROWS=ROWS, **tiling(d, q.dtype, tokens),
        enable_fp_fusion=True,
        launch_cooperative_grid=True,  # refused where not all programs would be resident
    )
    return out


def resident_programs(device: torch.device) -> int:
    """How many programs run at once: one on each multiprocessor, whose registers it fills."""
    return torch.cuda.get_device_properties(device).multi_processor_count
