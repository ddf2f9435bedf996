"""Flash attention whose loads of keys and values mix the source rows in."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlock_kernels._triton import Unsupported
from kvlock_kernels._triton.tiles import lerp, load_source, source_options, source_pointers

LOG2_E, LN2 = math.log2(math.e), tl.constexpr(math.log(2))
IN_LOOP_TOKENS = 32  # a tile with its source rows; the same without any, so that ratio 0 gives the bits of none
MAX_HEAD_DIM = 128  # with 256 the tiles no longer fit the registers


@triton.jit
def load_mixed(x, source, scale, mean, token, d, known, inner, row, a, head, b, mean_b, stride_n, rows,
               H: tl.constexpr, D: tl.constexpr, PACKING: tl.constexpr, HAS_MEAN: tl.constexpr, LERP: tl.constexpr):
    """A tile [TOKENS, DIM] of keys or values of one head, mixed with its source rows. Loads nothing it does not use."""
    if LERP:
        # That `known` is part of it keeps the mixing out of the layout of the products' operands, in which every warp
        # would repeat it for the whole tile: the compiler moves only what comes from loads alone there.
        mixes = known & (row >= 0) & ((a > 0) | (a != a))  # a NaN ratio spreads
        old = tl.load(x + token * stride_n + d, mask=known & inner & ~(mixes & (a >= 1)), other=0.0)
        s = load_source(source, scale, mean, row, head, d, mixes & inner, mixes, rows, b, mean_b, H, D, PACKING,
                        HAS_MEAN)
        return tl.where(mixes, lerp(old, s, a), old)
    return tl.load(x + token * stride_n + d, mask=known & inner, other=0.0)


@triton.jit
def attend_tile(
    q, k, v, out, lse, k_source, k_scale, k_mean, v_source, v_scale, v_mean, source_row, ratio, m, n, rows, qk_scale,
    q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    tile, b, head, LERP: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    K_PACKING: tl.constexpr, K_SHARED: tl.constexpr, K_MEANS: tl.constexpr,
    V_PACKING: tl.constexpr, V_SHARED: tl.constexpr, V_MEANS: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):
    """Tile number `tile` of QUERIES queries of one head (int64) of sample b (int64).

    The softmax is in base 2 and online over tiles of TOKENS keys.
    """
    query = tile * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM)[None, :]
    inner = d < D
    asked = (query < m)[:, None] & inner
    q_at = q + b * q_stride_b + head * q_stride_h + query.to(tl.int64)[:, None] * q_stride_m + d
    queries = tl.load(q_at, mask=asked, other=0.0)
    k += b * k_stride_b + head * k_stride_h
    v += b * v_stride_b + head * v_stride_h
    a = tl.load(ratio + b + tl.zeros([1, 1], tl.int64)) if LERP else tl.zeros([1, 1], tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM], tl.float32)
    for start in range(0, n, TOKENS):
        number = start + tl.arange(0, TOKENS)
        token = number.to(tl.int64)[:, None]
        known = token < n
        row = tl.load(source_row + token, mask=known, other=-1).to(tl.int64) if LERP else token
        keys = load_mixed(k, k_source, k_scale, k_mean, token, d, known, inner, row, a, head, 0 if K_SHARED else b,
                          b if K_MEANS > 1 else 0, k_stride_n, rows, H, D, K_PACKING, K_MEANS > 0, LERP)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where((number < n)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - higher[:, None])
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, 1)
        highest = higher
        values = load_mixed(v, v_source, v_scale, v_mean, token, d, known, inner, row, a, head, 0 if V_SHARED else b,
                            b if V_MEANS > 1 else 0, v_stride_n, rows, H, D, V_PACKING, V_MEANS > 0, LERP)
        acc = tl.dot(weights.to(values.dtype), values, acc * fading[:, None], input_precision=PRECISION)
    at = ((b * m + query.to(tl.int64)[:, None]) * H + head) * D + d
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=asked)
    if LSE:
        natural = (highest + tl.log2(total)) * LN2
        tl.store(lse + (b * H + head) * m + query, natural, mask=query < m)


@triton.jit
def in_loop_kernel(
    q, k, v, out, lse, k_source, k_scale, k_mean, v_source, v_scale, v_mean, source_row, ratio, m, n, rows, qk_scale,
    q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    LERP: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    K_PACKING: tl.constexpr, K_SHARED: tl.constexpr, K_MEANS: tl.constexpr,
    V_PACKING: tl.constexpr, V_SHARED: tl.constexpr, V_MEANS: tl.constexpr,
    QUERIES: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
):
    """Program = one tile of queries of one head of one sample."""
    program, tiles = tl.program_id(0), tl.cdiv(m, QUERIES)  # only a grid's first axis has room for any number of heads
    b, head = (program // tiles // H).to(tl.int64), (program // tiles % H).to(tl.int64)
    attend_tile(q, k, v, out, lse, k_source, k_scale, k_mean, v_source, v_scale, v_mean, source_row, ratio, m, n, rows,
                qk_scale, q_stride_b, q_stride_m, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b,
                v_stride_n, v_stride_h, program % tiles, b, head, LERP, LSE, PRECISION, H, D, K_PACKING, K_SHARED,
                K_MEANS, V_PACKING, V_SHARED, V_MEANS, QUERIES, TOKENS, DIM)


def attend_in_loop(
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
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`: one launch, and k and v are not touched."""
    n, rows = k.shape[1], index.shape[0]
    q, k, v = checked(q, k, v, scale)
    b, m, h, d = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, h, m) if return_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    tiles = tiling(d, q.dtype, IN_LOOP_TOKENS)
    in_loop_kernel[(triton.cdiv(m, tiles["QUERIES"]) * b * h,)](
        q, k, v, out, lse, *source_pointers(k_source, k_scale, k_mean), *source_pointers(v_source, v_scale, v_mean),
        rows_of_tokens(index, n), ratio.contiguous(), m, n, rows, scale * LOG2_E, *strides(q, k, v),
        LERP=rows > 0, LSE=return_lse, PRECISION=precision(q), H=h, D=d,
        **source_options(k_source, k_mean, "K_"), **source_options(v_source, v_mean, "V_"), **tiles,
        enable_fp_fusion=False,  # mixed rows have the bits that `kv_lerp_` gives them
    )
    return out, lse


def checked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with the elements of a head side by side.

    Raises:
        Unsupported: the kernels do not take this dtype, head dimension or scale.
    """
    if q.shape[3] > MAX_HEAD_DIM:
        raise Unsupported(f"head dimension {q.shape[3]}; the attention kernels take at most {MAX_HEAD_DIM}")
    if k.dtype != q.dtype:
        raise Unsupported(f"queries of {q.dtype} and keys of {k.dtype}")
    if scale <= 0:
        raise Unsupported(f"scale {scale}; the kernels look for the largest score before they scale")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def precision(q: Tensor) -> str:
    """How products of fp32 are formed: on ordinary cores, because tensor cores would round the factors to tf32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def strides(*tensors: Tensor) -> list[int]:
    """The first three of each tensor [B, N, H, D]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def rows_of_tokens(index: Tensor, tokens: int) -> Tensor:
    """The source row of each token, [tokens] int32, -1 for none: the inverse of `index`."""
    source_row = torch.full((tokens,), -1, dtype=torch.int32, device=index.device)
    number = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return source_row.scatter_(0, index.long(), number)


def tiling(d: int, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Sizes of the tiles, warps and stages; for 16-bit numbers the largest that spill on no GPU from sm_80 to sm_90.

    `tokens` is the number of keys of such a tile.
    """
    dim = max(triton.next_power_of_2(d), 16)
    if dtype == torch.float32:
        return {"QUERIES": 32, "TOKENS": 16, "DIM": dim, "num_warps": 8, "num_stages": 1}
    return {"QUERIES": 128, "TOKENS": tokens, "DIM": dim, "num_warps": 8, "num_stages": 2}
