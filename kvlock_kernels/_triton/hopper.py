"""Plain attention for sm_90 in Gluon: loads in a warp of their own, and softmax of a tile over PV of the tile before.

Triton's interpreter does not run Gluon: without a GPU only the machine code can be looked at, the values need one.
"""

import contextvars
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvlock_kernels._triton import Unsupported
from kvlock_kernels._triton.in_loop import LOG2_E, strides

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
ALIGNMENT = 16  # bytes: what the tensor memory accelerator wants of addresses and strides
ROWS = gl.constexpr(64)  # queries of a consumer: the M of a wgmma, so that a row lies within four threads
CONSUMERS = gl.constexpr(2)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)  # with the first consumer's: all 64 Ki
BLOCK_N, STAGES = 128, 2  # keys of a tile and tiles in flight: a third does not fit shared memory
LN2 = gl.constexpr(0.6931471805599453)
# Triton 3.8 gave them these names, 3.9 took the old ones away.
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_async = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def tile_start(i, tiles, BLOCK_N: gl.constexpr):
    """The first key of the i-th tile taken. The last tile, which may be ragged, comes first; softmax does not care."""
    return gl.where(i == 0, tiles - 1, i - 1) * BLOCK_N


@gluon.jit
def stage_of(i, STAGES: gl.constexpr):
    """Which buffer the i-th tile lies in, and the parity of its turn there."""
    return i % STAGES, (i // STAGES) & 1


@gluon.jit
def fill(tensor, start, ring, i, STAGES: gl.constexpr):
    """Loads a tile [BLOCK_N, DIM] into its buffer once every consumer has left it; rows beyond N become zero."""
    tiles, full, empty = ring
    stage, parity = stage_of(i, STAGES)
    mbarrier.wait(empty.index(stage), parity ^ 1)
    mbarrier.expect(full.index(stage), tensor.block_type.nbytes)
    load_async(tensor, [start, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def produce(q_desc, k_desc, v_desc, q_s, q_full, k_ring, v_ring, row, tiles, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr):
    """One warp: all loads of the program."""
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        load_async(q_desc, [row + c * ROWS, 0], q_full.index(c), q_s.index(c))
    for i in range(tiles):
        start = tile_start(i, tiles, BLOCK_N)
        fill(k_desc, start, k_ring, i, STAGES)
        fill(v_desc, start, v_ring, i, STAGES)


@gluon.jit
def arrived(ring, i, STAGES: gl.constexpr):
    """The buffer of tile i, when the tile lies in it."""
    tiles, full, _ = ring
    stage, parity = stage_of(i, STAGES)
    mbarrier.wait(full.index(stage), parity)
    return tiles.index(stage)


@gluon.jit
def leave(ring, i, STAGES: gl.constexpr):
    """Says that this consumer has read tile i."""
    _, _, empty = ring
    stage, _ = stage_of(i, STAGES)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def online_softmax(s, row_max, row_sum, scale_log2):
    """Weights of a tile relative to the new maximum, the new maximum and sum, and what scales the old ones."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_max[:, None])
    shrink = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * shrink + gl.sum(p, 1), shrink


@gluon.jit
def consume(out_desc, lse, q, q_full, k_ring, v_ring, row, tiles, M, N, scale_log2, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr, DIM: gl.constexpr, LSE: gl.constexpr):
    """Four warps: ROWS queries from `row` on. While PV of a tile runs, the scores of the next become weights."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, DIM], gl.float32, VALUES)

    mbarrier.wait(q_full, 0)
    keys = arrived(k_ring, 0, STAGES)
    pending_scores = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [pending_scores])
    leave(k_ring, 0, STAGES)
    column = tile_start(0, tiles, BLOCK_N) + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    s = gl.where((column < N)[None, :], s, float("-inf"))
    p, row_max, row_sum, shrink = online_softmax(s, row_max, row_sum, scale_log2)
    p = gl.convert_layout(p.to(q.dtype), WEIGHTS)
    values = arrived(v_ring, 0, STAGES)

    for i in range(1, tiles):
        keys = arrived(k_ring, i, STAGES)
        pending_scores = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
        pending_values = warpgroup_mma(p, values, acc, is_async=True)
        s = warpgroup_mma_wait(1, [pending_scores])
        leave(k_ring, i, STAGES)
        weights, row_max, row_sum, shrink = online_softmax(s, row_max, row_sum, scale_log2)
        p = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
        # ptxas moves the end of PV up as far as it can: before the weights, if no loop that waits stood between.
        values = arrived(v_ring, i, STAGES)
        acc = warpgroup_mma_wait(0, [pending_values])
        leave(v_ring, i - 1, STAGES)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]

    acc = warpgroup_mma_wait(0, [warpgroup_mma(p, values, acc, is_async=True)])
    acc *= gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, VALUES))[:, None]
    if LSE:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        gl.store(lse + rows, (row_max + gl.log2(row_sum)) * LN2, mask=rows < M)
    q.store(acc.to(q.dtype))  # the queries have been read, by this consumer only
    fence_async_shared()
    store_async(out_desc, [row, 0], q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "blocks"])
def hopper_kernel(
    q, k, v, out, lse, M, N, heads, blocks, scale_log2,
    q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    D: gl.constexpr, DIM: gl.constexpr, LSE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):
    """Program = CONSUMERS * ROWS queries of one head; neighbours share the head's keys and values in the cache."""
    gl.static_assert(STAGES >= 2)  # a consumer waits for the values of a tile before it leaves those of the last one
    program = gl.program_id(0)
    head = (program // blocks).to(gl.int64)
    row = program % blocks * (CONSUMERS * ROWS)
    b, h = head // heads, head % heads
    q += b * q_stride_b + h * q_stride_h
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    out += (b * M * heads + h) * D
    lse += head * M
    dtype: gl.constexpr = q.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # A descriptor of one head each: rows beyond M or N are neither read nor written, whatever follows in memory.
    q_desc = tma.make_tensor_descriptor(q, [M, D], [q_stride_m, 1], [ROWS, DIM], TILE)
    k_desc = tma.make_tensor_descriptor(k, [N, D], [k_stride_n, 1], [BLOCK_N, DIM], TILE)
    v_desc = tma.make_tensor_descriptor(v, [N, D], [v_stride_n, 1], [BLOCK_N, DIM], TILE)
    out_desc = tma.make_tensor_descriptor(out, [M, D], [heads * D, 1], [ROWS, DIM], TILE)

    q_s = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DIM], TILE)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], TILE)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)

    tiles = gl.cdiv(N, BLOCK_N)
    k_ring, v_ring = (k_s, k_full, k_empty), (v_s, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (out_desc, lse, q_s.index(0), q_full.index(0), k_ring, v_ring, row, tiles, M, N, scale_log2,
                       BLOCK_N, STAGES, DIM, LSE)),
            (consume, (out_desc, lse, q_s.index(1), q_full.index(1), k_ring, v_ring, row + ROWS, tiles, M, N,
                       scale_log2, BLOCK_N, STAGES, DIM, LSE)),
            (produce, (q_desc, k_desc, v_desc, q_s, q_full, k_ring, v_ring, row, tiles, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ k.T) @ v of every head.

    Args:
        q: [B, M, H, D] bf16 or fp16, D <= 128 and a multiple of 8.
        k, v: [B, N, H, D] of the same dtype, N >= 1.

    Returns:
        out [B, M, H, D] in q's dtype, and the natural logarithm of the sum of exponentials [B, H, M] fp32 ([0] where
        it is not asked for).

    Raises:
        Unsupported: the kernel does not take this dtype, head dimension or scale, or is not made for this GPU.
    """
    if reason := why_not(q, k, scale):
        raise Unsupported(reason)
    b, m, h, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, m) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (described(x) for x in (q, k, v))
    grid, arguments, options = launch_arguments(q, k, v, out, lse, scale, return_lse)

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        hopper_kernel[grid](*arguments, **options)

    # Descriptors made on the device need memory from an allocator, which Triton keeps in a context variable: set in a
    # copy of the context it ends with this launch, and one that the caller has set stays.
    contextvars.copy_context().run(run)
    return out, lse


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, return_lse: bool
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """The grid, the arguments and the options of the kernel's launch."""
    (b, m, h, d), n = q.shape, k.shape[1]
    blocks = triton.cdiv(m, CONSUMERS.value * ROWS.value)
    arguments = q, k, v, out, lse, m, n, h, blocks, scale * LOG2_E, *strides(q, k, v)
    options = {
        "D": d, "DIM": max(triton.next_power_of_2(d), 64), "LSE": return_lse, "BLOCK_N": BLOCK_N, "STAGES": STAGES,
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return (blocks * b * h,), arguments, options


def compile_for(dtype: torch.dtype, heads: int, dim: int) -> None:
    """Compiles what calls without the log-sum-exp run, of so many heads; nothing is launched.

    Raises:
        Exception: this Triton does not compile it. What it raises differs with what is missing.
    """
    row = torch.empty(1, 1, heads, dim, dtype=dtype, device="meta")
    grid, arguments, options = launch_arguments(row, row, row, row, torch.empty(0, device="meta"), 1.0, False)
    hopper_kernel.warmup(*arguments, grid=grid, **options)


def why_not(q: Tensor, k: Tensor, scale: float) -> str | None:
    """Why the kernel does not take this call, or None."""
    d, capability = q.shape[3], torch.cuda.get_device_capability(q.device)
    if capability != (9, 0):
        return f"a GPU of compute capability {capability[0]}.{capability[1]}; the kernel is made of instructions of 9.0"
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"queries of {q.dtype} and keys of {k.dtype}; the kernel takes bfloat16 or float16 in both"
    if d > MAX_HEAD_DIM or d * q.element_size() % ALIGNMENT:
        return f"head dimension {d}; the kernel takes multiples of 8 up to {MAX_HEAD_DIM}"
    if not scale > 0:
        return f"scale {scale}; the kernel takes the maximum before it multiplies by a positive one"
    return None


def described(x: Tensor) -> Tensor:
    """x [B, N, H, D] itself where a descriptor can address its rows, otherwise a contiguous copy."""
    size = x.element_size()
    aligned = all(step * size % ALIGNMENT == 0 for step in x.stride()[:3])
    rows = x.stride(3) == 1 and x.stride(1) >= x.shape[3]
    return x if rows and aligned and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)
