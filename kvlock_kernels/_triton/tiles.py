"""Tiles of key and value rows, [TOKENS, HEADS, DIM], shared by the kernels that gather them."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton import Unsupported

MAX_HEAD_DIM = 256  # the largest one the kernels are tested for
WARPS = 8
TILE, PACKED_TILE = 2048, 4096  # 8 or 16 elements a thread, so that 16 bytes of source rows come with each load
# A product and a sum fused into one rounding would give other bits than the reference: other int8 codes, for example.
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}
FLAT_DIM = 128  # rows without heads are cut into pieces of this length, or of the largest power of two in them

PLAIN, INT8, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how source rows are stored
PACKINGS = {torch.int8: 1, torch.float8_e4m3fn: 2}


class Tiling(NamedTuple):
    """How rows of H heads and D elements are cut; every field but `blocks` is a constexpr of the kernels."""

    tokens: int
    heads: int
    dim: int  # D rounded up to a power of two
    blocks: int  # tiles for all rows

    @classmethod
    def of(cls, rows: int, heads: int, dim: int, size: int = TILE) -> "Tiling":
        """Tiles of up to `size` elements, a power of two, whose heads divide H.

        Raises:
            Unsupported: D is larger than MAX_HEAD_DIM.
        """
        if dim > MAX_HEAD_DIM:
            raise Unsupported(f"head dimension {dim}; the kernels take at most {MAX_HEAD_DIM}")
        padded = triton.next_power_of_2(dim)
        together = math.gcd(heads, size // padded)  # a power of two, because `size` is one
        tokens = min(size // (padded * together), triton.next_power_of_2(max(rows, 1)))
        return cls(tokens, together, padded, triton.cdiv(rows, tokens) * (heads // together))


def with_heads(x: Tensor, like: Tensor) -> Tensor:
    """Views x [B, N, C] as [B, N, H, D], with the heads of `like` if it has some; x [B, N, H, D] stays as it is."""
    if x.ndim == 4:
        return x
    if like.ndim == 4:
        return x.unflatten(2, like.shape[2:])
    piece = math.gcd(x.shape[2], FLAT_DIM)
    return x.unflatten(2, (x.shape[2] // piece, piece))


def as_bytes(data: Tensor) -> Tensor:
    """The codes of 8-bit rows where Triton cannot load their dtype on every GPU; other tensors as they are."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data


def dense(value: Tensor | None, otherwise: Tensor) -> Tensor:
    """A contiguous tensor to point a kernel at; `otherwise` stands in for a missing one, which is never read."""
    return otherwise if value is None else value.contiguous()


def source_pointers(source: Tensor, scale: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Source rows, their scale and their mean as the kernels take them."""
    data = as_bytes(source.contiguous())
    return data, dense(scale, data), dense(mean, data)


def means(mean: Tensor | None) -> int:
    """No mean, one for all samples, or (2) one for each: not their number, for which kernels would compile anew."""
    return 0 if mean is None else min(mean.shape[0], 2)


def source_options(source: Tensor, mean: Tensor | None, prefix: str = "") -> dict[str, Any]:
    """The constexprs that say how source rows are stored, shared and centred."""
    options = {
        "PACKING": PACKINGS.get(source.dtype, 0),
        "SHARED": source.shape[0] == 1,
        "MEANS": means(mean),
    }
    return {prefix + name: value for name, value in options.items()}


@triton.jit
def tile_of(block, HEADS_OF_ROW: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Row, head and element numbers of tile `block`, int64 [TOKENS, 1, 1], [1, HEADS, 1] and [1, 1, DIM]."""
    across: tl.constexpr = HEADS_OF_ROW // HEADS
    rows = (block // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    heads = (block % across).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    return rows[:, None, None], heads[None, :, None], tl.arange(0, DIM).to(tl.int64)[None, None, :]


@triton.jit
def e4m3_to_fp32(code):
    """Decodes e4m3 from uint8 on every GPU: an fp16 with the bits shifted into place is 256 times too small."""
    bits = ((code.to(tl.uint16) & 0x80) << 8) | ((code.to(tl.uint16) & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def round_half_even(x):
    """Rounds |x| <= 2**22 to a whole number: at 1.5 * 2**23 the spacing of fp32 is one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def fp32_to_e4m3(x):
    """Encodes |x| < 464 or NaN as e4m3 in uint8, to nearest even, on GPUs without an instruction for it."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Keep 3 of 23 mantissa bits; the exponent's bias goes from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the codes are equidistant: 2**-9 apart. Rounding up to 8 gives the smallest normal number.
    subnormal = round_half_even(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(size < (121 << 23), subnormal, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_mean(mean, b, row, head, d, H: tl.constexpr, D: tl.constexpr):
    """The mean of each row's head and element, once a row: as a smaller tile it would be spread over other threads."""
    at = tl.broadcast_to((b * H + head) * D + d, (row + head + d).shape)
    heads = head + tl.zeros_like(d)  # of a single head a block, which a comparison can combine with other blocks
    return tl.load(mean + at, mask=(row >= 0) & (heads < H) & (d < D), other=0.0)


@triton.jit
def load_source(source, scale, mean, row, head, d, valid, heads_valid, rows, b, mean_b, H: tl.constexpr,
                D: tl.constexpr, PACKING: tl.constexpr, HAS_MEAN: tl.constexpr):
    """A tile of sample b's source rows: decoded to fp32 where packed, in the dtype they are stored in where not."""
    at = (b * rows + row) * H + head
    values = tl.load(source + at * D + d, mask=valid, other=0)  # beyond D too, where products of attention read it
    if PACKING != PLAIN:
        values = e4m3_to_fp32(values) if PACKING == E4M3 else values.to(tl.float32)
        values *= tl.load(scale + at, mask=heads_valid)
        if HAS_MEAN:
            values += load_mean(mean, mean_b, row, head, d, H, D)
    return values


@triton.jit
def lerp(x, source, a):
    """Mixes in fp32, rounded once to x's dtype; source itself where a >= 1. Where a <= 0 the caller keeps x."""
    mixed = (1 - a) * x.to(tl.float32) + a * source.to(tl.float32)
    return tl.where(a >= 1, source.to(x.dtype), mixed.to(x.dtype))
