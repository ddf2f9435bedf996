"""Plain attention for sm_90: loads in a warp group of their own, two warp groups that multiply in turn."""

import contextvars
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton import Unsupported
from kvlock_kernels._triton.attention import LN2, LOG2_E, strides

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
ALIGNMENT = 16  # bytes: what the tensor memory accelerator wants of addresses and strides
BLOCK_M = 128  # two warp groups of 64 queries, the M of a wgmma
BLOCK_N = 128  # 546 instructions a warp and tile where 64 keys take 353; a third buffer does not fit shared memory


@triton.jit(do_not_specialize=["M", "N", "blocks"])  # a loop over one key would be no loop, and have no roles
def attention_kernel(
    q, k, v, out, lse, M, N, heads, blocks, scale_log2,
    q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    D: tl.constexpr, DIM: tl.constexpr, LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Program = BLOCK_M queries of one head; neighbours share the head's keys and values in the cache.

    The compiler gives warp groups roles only where there is one loop, without a branch in it and with no product
    outside it, that takes its tiles from descriptors made here; otherwise it makes a slow kernel and says nothing.
    """
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    row = program % blocks * BLOCK_M
    b, h = head // heads, head % heads
    dtype: tl.constexpr = q.dtype.element_ty
    # A descriptor of one head each: rows beyond M or N are neither read nor written, whatever follows in memory.
    q_desc = tl.make_tensor_descriptor(q + b * q_stride_b + h * q_stride_h, [M, D], [q_stride_m, 1], [BLOCK_M, DIM])
    k_desc = tl.make_tensor_descriptor(k + b * k_stride_b + h * k_stride_h, [N, D], [k_stride_n, 1], [BLOCK_N, DIM])
    v_desc = tl.make_tensor_descriptor(v + b * v_stride_b + h * v_stride_h, [N, D], [v_stride_n, 1], [BLOCK_N, DIM])
    out_desc = tl.make_tensor_descriptor(out + (b * M * heads + h) * D, [M, D], [heads * D, 1], [BLOCK_M, DIM])

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    queries = q_desc.load([row, 0])
    for start in tl.range(0, N, BLOCK_N, warp_specialize=True):
        s = tl.dot(queries, k_desc.load([start, 0]).T)
        if RAGGED:
            s = tl.where((tl.arange(0, BLOCK_N) < N - start)[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(dtype), v_desc.load([start, 0]), acc * shrink[:, None])
        row_max = new_max
    out_desc.store([row, 0], (acc * (1.0 / row_sum)[:, None]).to(dtype))
    if LSE:
        rows = row + tl.arange(0, BLOCK_M)
        tl.store(lse + head * M + rows, (row_max + tl.log2(row_sum)) * LN2, mask=rows < M)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ k.T) @ v of every head.

    Args:
        q: [B, M, H, D] bf16 or fp16, D <= 128 and a multiple of 8.
        k, v: [B, N, H, D] of the same dtype, N >= 1.

    Returns:
        out [B, M, H, D] in q's dtype, and the natural logarithm of the sum of exponentials [B, H, M] fp32 ([0] where
        it is not asked for).

    Raises:
        Unsupported: the kernel does not take this dtype, head dimension or scale.
    """
    return launch(
        attention_kernel, q, k, v, scale, return_lse,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, RAGGED=k.shape[1] % BLOCK_N != 0, num_warps=4, num_stages=2,
    )


def launch(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Starts one of the kernels of sm_90 on every block of queries of every head."""
    (b, m, h, d), n = q.shape, k.shape[1]
    if q.dtype not in DTYPES:
        raise Unsupported(f"attention of {str(q.dtype).removeprefix('torch.')}; the kernel takes bfloat16 and float16")
    if d > MAX_HEAD_DIM or d * q.element_size() % ALIGNMENT:
        raise Unsupported(f"head dimension {d}; the kernel takes multiples of 8 up to {MAX_HEAD_DIM}")
    if not scale > 0:
        raise Unsupported(f"scale {scale}; the kernel takes the maximum before it multiplies by a positive one")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, m) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (described(x) for x in (q, k, v))
    blocks = triton.cdiv(m, BLOCK_M)

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        kernel[(blocks * b * h,)](
            q, k, v, out, lse, m, n, h, blocks, scale * LOG2_E, *strides(q, k, v),
            D=d, DIM=max(triton.next_power_of_2(d), 64), LSE=return_lse, **options,
        )

    # Descriptors made on the device need memory from an allocator, which Triton keeps in a context variable: set in a
    # copy of the context it ends with this launch, and one that the caller has set stays.
    contextvars.copy_context().run(run)
    return out, lse


def described(x: Tensor) -> Tensor:
    """x [B, N, H, D] itself where a descriptor can address its rows, otherwise a contiguous copy."""
    size = x.element_size()
    aligned = all(step * size % ALIGNMENT == 0 for step in x.stride()[:3])
    rows = x.stride(3) == 1 and x.stride(1) >= x.shape[3]
    return x if rows and aligned and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)
