"""Public operators for Wan's self-attention: QK norm, RoPE and the lock in one pass over the projections.

Letters and errors are those of `kvlock_kernels.api`; D is the number of columns of cos and sin, and H = C / D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvlock_kernels._checks import (
    EIGHT_BIT,
    FLOATING,
    LerpNames,
    check_ndim,
    check_number,
    check_ratio,
    check_shape,
    check_source,
    check_tensor,
    check_writable,
    refuse,
)
from kvlock_kernels._ops import ops
from kvlock_kernels.api import PackedRows


class Projections(NamedTuple):
    """Queries, keys and values, ready for attention: the very tensors that were passed in."""

    q: Tensor  # [B, N, C]
    k: Tensor  # [B, N, C]
    v: Tensor  # [B, N, C]


class RecordedRows(NamedTuple):
    """Source rows of keys, normalised and not yet rotated, and of values."""

    k: PackedRows
    v: PackedRows


def qk_norm_rope_kv_lerp_(
    q: Tensor,  # [B, N, C] floating, changed in place
    k: Tensor,  # [B, N, C] in q's dtype, changed in place
    v: Tensor,  # [B, N, C] in q's dtype, changed in place
    q_weight: Tensor,  # [C] floating
    k_weight: Tensor,  # [C] floating
    cos: Tensor,  # [N, D] floating, every angle twice side by side; D even
    sin: Tensor,  # [N, D] likewise
    k_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C], floating, float8_e4m3fn or int8; Bs is 1 or B
    v_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C] likewise
    source_row: Tensor,  # [N] int32, no row twice
    ratio: Tensor,  # [B] fp32
    *,
    eps: float,
    k_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    v_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    k_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
    v_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
) -> Projections:
    """Normalises and rotates queries and keys and mixes source rows into keys and values, in place.

        norm(x)    = x / sqrt(mean(x^2) + eps) * weight            over all C elements of a token, as Wan does
        rope(x)    = x[2i] cos[2i] - x[2i+1] sin[2i+1],  x[2i] sin[2i+1] + x[2i+1] cos[2i]
        q <- rope(norm(q)),    k <- rope(lerp(norm(k))),    v <- lerp(v)

    all in fp32, rounded once. `source_row` says which row of the source a token mixes with, -1 for none; with 6 tokens
    of which 1, 2 and 5 are locked:

        token        0  1  2  3  4  5
        source_row  -1  0  1 -1 -1  2

    `lerp` and its exact ends are those of `kv_lerp_`: with ratio <= 0, or without rows, this is norm and RoPE alone and
    v keeps its bits; with ratio >= 1 the locked keys are the rotated source rows, whatever k holds there.
    """
    heads = _check_projections(q, k, v, q_weight, k_weight, cos, sin, source_row, eps)
    check_writable("v", v)
    check_ratio(ratio, q)
    rows = _check_rows(("k", "k_source", "k_scale", "k_mean"), k, heads, k_source, None, k_scale, k_mean)
    _check_rows(("v", "v_source", "v_scale", "v_mean"), v, heads, v_source, rows, v_scale, v_mean)
    ops.qk_norm_rope_kv_lerp_(
        q,
        k,
        v,
        q_weight,
        k_weight,
        cos,
        sin,
        k_source,
        v_source,
        source_row,
        ratio,
        eps=float(eps),
        k_scale=k_scale,
        v_scale=v_scale,
        k_mean=k_mean,
        v_mean=v_mean,
    )
    return Projections(q, k, v)


def qk_norm_rope_kv_pack_(
    q: Tensor,  # [B, N, C] floating, changed in place
    k: Tensor,  # [B, N, C] in q's dtype, changed in place
    v: Tensor,  # [B, N, C] in q's dtype
    q_weight: Tensor,  # [C] floating
    k_weight: Tensor,  # [C] floating
    cos: Tensor,  # [N, D] floating, every angle twice side by side; D even
    sin: Tensor,  # [N, D] likewise
    source_row: Tensor,  # [N] int32; holds each of 0 ... rows - 1 once, -1 elsewhere
    rows: int,
    dtype: torch.dtype,  # bfloat16, float16, float32, float8_e4m3fn or int8
    *,
    eps: float,
) -> RecordedRows:
    """Normalises and rotates queries and keys in place, and packs norm(k) and v of the tokens that have a row.

    The recording counterpart of `qk_norm_rope_kv_lerp_`: q and k are left as that leaves them without rows, and the
    packed rows are those of `pack_kv`, with keys taken in fp32 between norm and RoPE.
    """
    _check_projections(q, k, v, q_weight, k_weight, cos, sin, source_row, eps)
    if not isinstance(rows, (int, torch.SymInt)) or isinstance(rows, bool) or not 0 <= rows <= q.shape[1]:
        raise refuse("rows", repr(rows), f"an int from 0 to N = {q.shape[1]}")
    if dtype not in (*FLOATING, *EIGHT_BIT):
        raise refuse("dtype", repr(dtype), "bfloat16, float16, float32, float8_e4m3fn or int8")
    k_data, k_scale, v_data, v_scale = ops.qk_norm_rope_kv_pack_(
        q, k, v, q_weight, k_weight, cos, sin, source_row, rows, dtype, eps=float(eps)
    )
    packed = dtype in EIGHT_BIT
    return RecordedRows(
        PackedRows(k_data, k_scale if packed else None), PackedRows(v_data, v_scale if packed else None)
    )


def _check_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    source_row: Tensor,
    eps: float,
) -> tuple[int, int]:
    """Wants what both operators take in common; returns H and D."""
    check_tensor("q", q, FLOATING)
    check_ndim("q", q, "[B, N, C]", 3)
    _, n, c = q.shape
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, (q.dtype,), q)
        check_shape(name, value, "the shape of q", tuple(q.shape))
    check_writable("q", q)
    check_writable("k", k)
    for name, value in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_tensor(name, value, FLOATING, q)
        check_shape(name, value, "[C]", (c,))
    check_tensor("cos", cos, FLOATING, q)
    check_ndim("cos", cos, "[N, D]", 2)
    d = cos.shape[1]
    if d == 0 or d % 2 or c % d:
        raise refuse("cos", f"shape {list(cos.shape)}", f"[N, D] with D even and a divisor of C = {c}")
    check_shape("cos", cos, "[N, D]", (n, d))
    check_tensor("sin", sin, FLOATING, q)
    check_shape("sin", sin, "[N, D]", (n, d))
    check_tensor("source_row", source_row, (torch.int32,), q)
    check_shape("source_row", source_row, "[N]", (n,))
    check_number("eps", eps, "a finite number of at least 0", 0.0)
    return c // d, d


def _check_rows(
    names: LerpNames,
    x: Tensor,
    heads: tuple[int, int],
    source: Tensor,
    rows: int | None,
    scale: Tensor | None,
    mean: Tensor | None,
) -> int:
    """Wants source rows of x's heads, `rows` of them if given; returns how many there are."""
    check_tensor(names[1], source, (*FLOATING, *EIGHT_BIT), x)
    check_ndim(names[1], source, "[Bs, rows, H, D] or [Bs, rows, C]", 3, 4)
    found = source.shape[1]
    if found > x.shape[1]:
        raise refuse(names[1], f"{found} rows", f"at most N = {x.shape[1]}")
    like = x.view(*x.shape[:2], *heads) if source.ndim == 4 else x  # unflatten: not compiled inside torch.device
    check_source(names, like, source, found if rows is None else rows, scale, mean)
    return found
