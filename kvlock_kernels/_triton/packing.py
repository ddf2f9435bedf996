"""pack_kv and unpack_kv: rows gathered and encoded, or decoded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton.tiles import (
    E4M3,
    LAUNCH,
    PACKED_TILE,
    PACKINGS,
    PLAIN,
    TILE,
    Tiling,
    as_bytes,
    dense,
    fp32_to_e4m3,
    load_mean,
    load_source,
    means,
    round_half_even,
    tile_of,
)

E4M3_LIMIT, INT8_LIMIT = tl.constexpr(448.0), tl.constexpr(127.0)  # largest codes that are used
FP32_TINY = tl.constexpr(2.0**-126)  # smallest normal number
# A pass that reads much and writes little wants more loads in flight: 32 elements a thread take 46 us on an H100 where
# the 8 of the other kernels take 52, at 32760 tokens of 12 heads.
PACK_TILE, PACK_WARPS = 4096, 4
NATIVE_E4M3 = 89  # the first architecture with an instruction that encodes e4m3


@triton.jit
def larger_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_packed(x, data, scale, at, d, row_valid, valid, D: tl.constexpr, PACKING: tl.constexpr, NATIVE: tl.constexpr):
    """Encodes the tile x, zero beyond D, and stores it as rows `at` of data, with the scale of each row of a head."""
    if PACKING == PLAIN:
        tl.store(data + at * D + d, x.to(data.dtype.element_ty), mask=valid)
    else:
        LIMIT: tl.constexpr = E4M3_LIMIT if PACKING == E4M3 else INT8_LIMIT
        largest = tl.reduce(tl.abs(x), 2, larger_or_nan, keep_dims=True)
        s = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
        s = tl.where(s < FP32_TINY, 1.0, s)
        tl.store(scale + at, s, mask=row_valid)
        code = x * tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
        if PACKING == E4M3:
            code = code.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE else fp32_to_e4m3(code)
        else:
            code = round_half_even(code).to(tl.int8)
        tl.store(data + at * D + d, code, mask=valid)


@triton.jit
def pack_kernel(x, index, data, scale, mean, rows, row_blocks, stride_b, stride_n, stride_h, stride_d,
                MEANS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PACKING: tl.constexpr, NATIVE: tl.constexpr,
                TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Program = one tile of one sample."""
    program = tl.program_id(0)
    b = (program // row_blocks).to(tl.int64)
    row, head, d = tile_of(program % row_blocks, H, TOKENS, HEADS, DIM)
    valid = (row < rows) & (d < D)
    token = tl.load(index + row, mask=row < rows, other=0).to(tl.int64)
    values = tl.load(x + b * stride_b + token * stride_n + head * stride_h + d * stride_d, mask=valid, other=0.0)
    if PACKING != PLAIN:
        values = values.to(tl.float32)
        if MEANS > 0:
            values -= load_mean(mean, b if MEANS > 1 else 0, row, head, d, H, D)
    store_packed(values, data, scale, (b * rows + row) * H + head, d, row < rows, valid, D, PACKING, NATIVE)


@triton.jit
def unpack_kernel(data, scale, mean, out, rows, row_blocks, MEANS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                  PACKING: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Program = one tile of one sample."""
    program = tl.program_id(0)
    b = (program // row_blocks).to(tl.int64)
    row, head, d = tile_of(program % row_blocks, H, TOKENS, HEADS, DIM)
    valid = (row < rows) & (d < D)
    mean_b = b if MEANS > 1 else 0
    values = load_source(data, scale, mean, row, head, d, valid, row < rows, rows, b, mean_b, H, D, PACKING, MEANS > 0)
    tl.store(out + ((b * rows + row) * H + head) * D + d, values.to(out.dtype.element_ty), mask=valid)


def encodes_e4m3(x: Tensor) -> bool:
    """Whether the GPU that x is compiled for has an instruction that encodes e4m3; the interpreter has none."""
    return not x.is_cpu and triton.runtime.driver.active.get_current_target().arch >= NATIVE_E4M3


def pack_kv(x: Tensor, index: Tensor, dtype: torch.dtype, *, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.pack_kv`."""
    b, _, h, d = x.shape
    rows, packing = index.shape[0], PACKINGS.get(dtype, 0)
    data = x.new_empty((b, rows, h, d), dtype=dtype)
    scale = x.new_empty((b, rows, h) if packing else (0,), dtype=torch.float32)
    if data.numel() == 0:
        return data, scale
    tiling = Tiling.of(rows, h, d, PACK_TILE)
    pack_kernel[(tiling.blocks * b,)](
        x, dense(index, index), as_bytes(data), scale, dense(mean, scale), rows, tiling.blocks, *x.stride(),
        MEANS=means(mean), H=h, D=d, PACKING=packing, NATIVE=encodes_e4m3(x),
        TOKENS=tiling.tokens, HEADS=tiling.heads, DIM=tiling.dim, **LAUNCH | {"num_warps": PACK_WARPS},
    )
    return data, scale


def unpack_kv(data: Tensor, scale: Tensor | None, *, mean: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """See `kvlock_kernels.unpack_kv`."""
    b, rows, h, d = data.shape
    out = data.new_empty(data.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    tiling = Tiling.of(rows, h, d, PACKED_TILE if data.dtype in PACKINGS else TILE)
    codes = as_bytes(data.contiguous())
    unpack_kernel[(tiling.blocks * b,)](
        codes, dense(scale, codes), dense(mean, codes), out, rows, tiling.blocks,
        MEANS=means(mean), H=h, D=d, PACKING=PACKINGS.get(data.dtype, 0),
        TOKENS=tiling.tokens, HEADS=tiling.heads, DIM=tiling.dim, **LAUNCH,
    )
    return out
