"""Attention to keys and values mixed with source rows; letters and conventions are those of `api`."""

from typing import NamedTuple

from torch import Tensor

from kvlock_kernels._checks import (
    FLOATING,
    FP32,
    check_bool,
    check_ndim,
    check_number,
    check_rows,
    check_shape,
    check_tensor,
    check_writable,
    refuse,
)
from kvlock_kernels._ops import ops

LARGEST_SCALE = 1e38  # kernels multiply it by log2(e) in fp32
SCALES = f"0 or a finite number of size {FP32.tiny:.2g} to {LARGEST_SCALE:g}"


class AttentionOutput(NamedTuple):
    """Attention output and, on request, the log-sum-exp of the scaled scores."""

    out: Tensor  # [B, M, H, D] in q's dtype
    lse: Tensor | None  # [B, H, M] fp32, natural logarithm


def kv_lerp_attention(
    q: Tensor,  # [B, M, H, D] floating
    k: Tensor,  # [B, N, H, D] floating, N >= 1
    v: Tensor,  # [B, N, H, D] in k's dtype
    k_source: Tensor,  # [Bs, rows, H, D] floating, float8_e4m3fn or int8; Bs is 1 or B
    v_source: Tensor,  # [Bs, rows, H, D] likewise
    index: Tensor,  # [rows] int32, no row twice
    ratio: Tensor,  # [B] fp32
    *,
    scale: float | None = None,  # D ** -0.5 by default
    k_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    v_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    k_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
    v_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
    return_lse: bool = False,
) -> AttentionOutput:
    """Attends, without a causal mask, to keys and values as `kv_lerp_` would leave them; k and v stay as they are.

        out = softmax(scale * q lerp(k)^T) lerp(v),    lse = log sum exp(scale * q lerp(k)^T)

    The mixed rows are rounded to k's dtype first, so that the result is that of `kv_lerp_` on copies followed by
    attention, whose sums are in fp32. M may differ from N. No queries or no samples give an empty out and lse; no keys
    is an error. On CUDA plain PyTorch, which holds all scores, gives the log-sum-exp of heads larger than 128, of
    queries and keys of two dtypes, and with a scale that is not positive.
    """
    _check_queries_and_keys(q, k, v)
    check_rows(("k", "k_source", "k_scale", "k_mean"), k, k_source, index, ratio, k_scale, k_mean)
    check_rows(("v", "v_source", "v_scale", "v_mean"), v, v_source, index, ratio, v_scale, v_mean)
    check_bool("return_lse", return_lse)
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "v_mean": v_mean, "return_lse": return_lse}
    out, lse = ops.kv_lerp_attention(
        q, k, v, k_source, v_source, index, ratio, scale=_checked_scale(scale, q), **options
    )
    return AttentionOutput(out, lse if return_lse else None)


def kv_lerp_attention_(
    q: Tensor,  # [B, M, H, D] floating
    k: Tensor,  # [B, N, H, D] in q's dtype, N >= 1, used up
    v: Tensor,  # [B, N, H, D] in q's dtype, used up
    k_source: Tensor,  # [Bs, rows, H, D] floating, float8_e4m3fn or int8; Bs is 1 or B
    v_source: Tensor,  # [Bs, rows, H, D] likewise
    index: Tensor,  # [rows] int32, no row twice
    ratio: Tensor,  # [B] fp32
    *,
    scale: float | None = None,  # D ** -0.5 by default
    k_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    v_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    k_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
    v_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
) -> Tensor:
    """`kv_lerp_attention` for those who own k and v and need them no more: out [B, M, H, D] alone.

    Whether k and v are mixed in place is left to what is fastest: afterwards each of their rows is the old one or the
    mixed one. k and v share no memory, with each other or with a source. As in torch's `scaled_dot_product_attention`,
    products take factors in q's dtype and sums are in fp32.
    """
    check_tensor("q", q, FLOATING)
    check_tensor("k", k, (q.dtype,), q)
    _check_queries_and_keys(q, k, v)
    check_writable("k", k)
    check_writable("v", v)
    check_rows(("k", "k_source", "k_scale", "k_mean"), k, k_source, index, ratio, k_scale, k_mean)
    check_rows(("v", "v_source", "v_scale", "v_mean"), v, v_source, index, ratio, v_scale, v_mean)
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "v_mean": v_mean}
    return ops.kv_lerp_attention_(
        q, k, v, k_source, v_source, index, ratio, scale=_checked_scale(scale, q), **options
    )


def _check_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Wants q [B, M, H, D] and k, v [B, N, H, D] of one dtype."""
    check_tensor("q", q, FLOATING)
    check_ndim("q", q, "[B, M, H, D]", 4)
    b, _, h, d = q.shape
    check_tensor("k", k, FLOATING, q)
    check_tensor("v", v, (k.dtype,), q)
    check_ndim("k", k, "[B, N, H, D]", 4)
    n = k.shape[1]
    if n == 0 or d == 0:
        raise refuse("k", f"shape {list(k.shape)}", "[B, N, H, D] with N >= 1 and D >= 1")
    check_shape("k", k, "[B, N, H, D]", (b, n, h, d))
    check_shape("v", v, "[B, N, H, D]", (b, n, h, d))


def _checked_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[3] ** -0.5
    check_number("scale", scale, SCALES, -LARGEST_SCALE, LARGEST_SCALE)
    if 0 < abs(scale) < FP32.tiny:  # kernels that read it as 0 would multiply it with the -inf of masked scores
        raise refuse("scale", repr(scale), SCALES)
    return float(scale)
