"""The specification of every operator in plain PyTorch, computed in fp32.

Letters: B samples, N keys, M queries, H heads, D head dimension, C = H * D, W slots of the ring, rows = len(index).
Arguments are trusted here; `api` checks them. No function waits for the device. Results are contiguous.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)  # dtypes of rows that have a scale
E4M3_MAX = 448.0  # largest finite float8_e4m3fn
INT8_MAX = 127.0  # -128 stays unused, so that the code is symmetric
FP32_TINY = 2.0**-126  # smallest normal fp32; the reciprocal of a smaller scale may overflow


# y[b, i, ..] = ratio[b], seen as [B, 1, ..] beside a tensor of `ndim` axes
def per_sample(value: Tensor, ndim: int) -> Tensor:
    """Views `value` ([] or [B]) so that it broadcasts along the first of `ndim` axes."""
    return value.reshape(-1, *[1] * (ndim - 1))


# y[b] = sum_i x[b, i]
def sum_per_sample(x: Tensor) -> Tensor:
    """Sums [B, ...] over everything but the sample: [B]."""
    return x.reshape(x.shape[0], prod(x.shape[1:])).sum(1)


# decoded = data * scale + mean, for 8-bit rows; rows of a floating dtype are stored as they are
def decode(data: Tensor, scale: Tensor | None, mean: Tensor | None) -> Tensor:
    """Decodes rows [Bs, rows, H, D]: fp32 where they are 8-bit, untouched otherwise."""
    if scale is None:
        return data
    rows = data.float() * scale[..., None]
    return rows if mean is None else rows + mean[:, None]


# y = (1 - a) * x + a * s in fp32, rounded to x's dtype;   y = x where a <= 0;   y = s where a >= 1
def lerp(x: Tensor, source: Tensor, ratio: Tensor) -> Tensor:
    """Mixes rows x [B, rows, ...] with source [Bs, rows, ...] by ratio [B]; selects, so that the ends are exact."""
    a = per_sample(ratio, x.ndim)
    mixed = ((1 - a) * x.float() + a * source.float()).to(x.dtype)
    return torch.where(a <= 0, x, torch.where(a >= 1, source.to(x.dtype), mixed))


# x[b, index[i]] <- lerp(x[b, index[i]], decode(source)[b, i], ratio[b])
def kv_lerp_(
    x: Tensor,  # [B, N, H, D] or [B, N, C], mutated
    source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C], Bs in {1, B}
    index: Tensor,  # [rows] int32
    ratio: Tensor,  # [B] fp32
    *,
    source_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    source_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
) -> None:
    """Mixes the source rows into rows `index` of x, in place."""
    rows = decode(source, source_scale, source_mean)
    if rows.ndim > x.ndim:
        rows = rows.flatten(2)
    where = index.long()
    x.index_copy_(1, where, lerp(x.index_select(1, where), rows, ratio))


# k <- kv_lerp_(k), v <- kv_lerp_(v), with one index and one ratio
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
    """Mixes the source rows into keys and values, in place."""
    kv_lerp_(k, k_source, index, ratio, source_scale=k_scale, source_mean=k_mean)
    kv_lerp_(v, v_source, index, ratio, source_scale=v_scale, source_mean=v_mean)


# S = scale * q lerp(k)^T;   lse = log sum_n exp(S);   out = exp(S - lse) lerp(v)
def kv_lerp_attention(
    q: Tensor,  # [B, M, H, D]
    k: Tensor,  # [B, N, H, D]
    v: Tensor,  # [B, N, H, D]
    k_source: Tensor,  # [Bs, rows, H, D]
    v_source: Tensor,  # [Bs, rows, H, D]
    index: Tensor,  # [rows] int32
    ratio: Tensor,  # [B] fp32
    *,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends to the mixed keys and values: out [B, M, H, D] and lse [B, H, M] fp32 (empty when not requested)."""
    k, v = k.clone(), v.clone()
    kv_lerp_pair_(
        k, v, k_source, v_source, index, ratio, k_scale=k_scale, v_scale=v_scale, k_mean=k_mean, v_mean=v_mean
    )
    with torch.autocast(q.device.type, enabled=False):  # products in fp32, and the dtypes that are promised
        scores = scale * (q.float().transpose(1, 2) @ k.float().permute(0, 2, 3, 1))
        lse = torch.logsumexp(scores, dim=-1)
        out = torch.softmax(scores, dim=-1) @ v.float().transpose(1, 2)
    out = out.transpose(1, 2).to(q.dtype).contiguous()
    return out, lse if return_lse else lse.new_empty(0)


# k <- lerp(k);   v <- lerp(v);   out = softmax(scale * q k^T) v
def kv_lerp_attention_(
    q: Tensor,  # [B, M, H, D]
    k: Tensor,  # [B, N, H, D], mutated
    v: Tensor,  # [B, N, H, D], mutated
    k_source: Tensor,  # [Bs, rows, H, D]
    v_source: Tensor,  # [Bs, rows, H, D]
    index: Tensor,  # [rows] int32
    ratio: Tensor,  # [B] fp32
    *,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> Tensor:
    """Mixes keys and values in place and attends to them by torch, which needs no memory for the scores."""
    kv_lerp_pair_(
        k, v, k_source, v_source, index, ratio, k_scale=k_scale, v_scale=v_scale, k_mean=k_mean, v_mean=v_mean
    )
    if scale == 0:  # cuDNN gives NaN for it
        q, scale = 0 * q, 1.0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


# ring[step % W] <- x0;   n = min(step + 1, W);   var = sum_{j < n} (ring[j] - mean)^2 / (n - 1), 0 where n < 2
# y[b] = sum_i w[b, i] var[b, i] / sum_i w[b, i], 0 where the weights sum to 0
def windowed_variance_(
    x0: Tensor,  # [B, ...]
    history: Tensor,  # [W, B, ...] fp32, mutated
    step: Tensor,  # [] or [1] int64
    *,
    weight: Tensor | None = None,  # broadcastable to x0
) -> Tensor:
    """Writes x0 into the ring and returns the weighted mean of the variance over time: [B] fp32."""
    slots = history.shape[0]
    step = step.reshape(1)
    history.index_copy_(0, step % slots, x0.float()[None])

    n = (step + 1).clamp(max=slots)
    written = per_sample(torch.arange(slots, device=history.device) < n, history.ndim)
    # Seen from x0, entries near it are exact in fp32, however large mean / std is; equal entries give exactly 0.
    shifted = torch.where(written, history - x0.float(), 0)
    deviation = torch.where(written, shifted - shifted.sum(0) / n, 0)
    variance = torch.where(n < 2, 0, deviation.square().sum(0) / (n - 1).clamp(min=1))

    w = (history.new_ones(()) if weight is None else weight.float()).expand_as(variance)
    total = sum_per_sample(w)
    return torch.where(total == 0, 0, sum_per_sample(torch.where(w == 0, 0, w * variance)) / total)


# fusion_ratio = clamp(variance / tau, alpha_min, 1);   guidance = guidance_scale * clamp(variance / tau, 1, boost)
def lock_schedule(
    variance: Tensor,  # [B] fp32
    guidance_scale: Tensor,  # [] or [B] fp32
    *,
    tau: float,
    boost: float,
    alpha_min: float,
) -> tuple[Tensor, Tensor]:
    """Maps the variance to the fusion ratio [B] and the guidance scale [B]."""
    pressure = variance / variance.new_full((), tau)  # by a Python number torch does not divide on CUDA, see `pack_kv`
    return pressure.clamp(alpha_min, 1.0), guidance_scale * pressure.clamp(1.0, boost)


# s* = <c, u> / (|u|^2 + eps) per sample;   v = (1 - w) s* u + w c, c where w == 1;   x0 = x_scale x - sigma v
# w = guidance_scale inside the mask, background_guidance outside
def guided_velocity(
    cond: Tensor,  # [B, ...]
    uncond: Tensor | None,  # [B, ...]
    guidance_scale: Tensor,  # [] or [B] fp32
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [] or [B] fp32
    *,
    mask: Tensor | None = None,  # broadcastable to x, nonzero inside
    background_guidance: float | None = None,
    optimized_scale: bool = True,
    x_scale: Tensor | None = None,  # [] or [B] fp32
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guides the velocity: velocity in cond's dtype, s* [B] fp32 and x0 [B, ...] fp32."""
    c = cond.float()
    s_star = torch.ones(cond.shape[0], dtype=torch.float32, device=cond.device)
    if uncond is None:
        v, velocity = c, cond.clone(memory_format=torch.contiguous_format)
    else:
        u = uncond.float()
        if optimized_scale:
            s_star = sum_per_sample(c * u) / (sum_per_sample(u * u) + eps)
        w = per_sample(guidance_scale, c.ndim)
        if background_guidance is not None and mask is not None:
            w = torch.where(mask != 0, w, background_guidance)
        v = torch.where(w == 1, c, (1 - w) * per_sample(s_star, c.ndim) * u + w * c)
        velocity = torch.where(w == 1, cond, v.to(cond.dtype)).contiguous()
    scaled = x.float() if x_scale is None else per_sample(x_scale, x.ndim) * x.float()
    return velocity, s_star, (scaled - per_sample(sigma, x.ndim) * v).contiguous()


# r[b, i] = x[b, index[i]] - mean[b];   scale = max_d |r| / max(dtype), 1 where that is no normal number
# data = round(r * (1 / scale))
def pack_kv(x: Tensor, index: Tensor, dtype: torch.dtype, *, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packs rows of x [B, N, H, D]: data [B, rows, H, D] of dtype and scale [B, rows, H] fp32 (empty if not 8-bit)."""
    rows = x.index_select(1, index).contiguous()
    if dtype not in EIGHT_BIT:
        return rows.to(dtype), x.new_empty(0, dtype=torch.float32)
    rows = rows.float() if mean is None else rows.float() - mean[:, None]
    limit = INT8_MAX if dtype == torch.int8 else E4M3_MAX
    scale = rows.abs().amax(-1) / rows.new_full((), limit)  # torch on CUDA multiplies by a Python number's inverse
    scale = torch.where(scale < FP32_TINY, 1.0, scale)
    code = rows * (1 / scale)[..., None]  # the limit is exceeded by rounding only, too little to leave its code
    return (code.round() if dtype == torch.int8 else code).to(dtype), scale


# rows = data * scale + mean
def unpack_kv(data: Tensor, scale: Tensor | None, *, mean: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """Unpacks rows [B, rows, H, D] to a new tensor of dtype."""
    return decode(data, scale, mean).to(dtype, copy=True, memory_format=torch.contiguous_format)


# y = x / sqrt(mean_c x_c^2 + eps) * weight_c, over all C = H * D
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises [B, N, C] over C, in fp32: the norm of Wan's queries and keys runs across the heads."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


# y[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i + 1];   y[2i + 1] = x[2i] sin[2i + 1] + x[2i + 1] cos[2i]
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of x [B, N, H, D] fp32 by each token's angles, cos and sin [N, D] with every angle twice."""
    c, s = cos.float()[:, None, 0::2], sin.float()[:, None, 1::2]
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * c - second * s, first * s + second * c], -1).flatten(-2)


# y[b, n] = lerp(x[b, n], decode(source)[b, source_row[n]], ratio[b]) where source_row[n] >= 0, x[b, n] elsewhere
def lerp_tokens(
    x: Tensor, source: Tensor, source_row: Tensor, ratio: Tensor, scale: Tensor | None, mean: Tensor | None
) -> Tensor:
    """Mixes source rows into the tokens x [B, N, H, D] that have one."""
    if source.shape[1] == 0:
        return x
    rows = decode(source, scale, mean)
    if rows.ndim < x.ndim:
        rows = rows.unflatten(2, x.shape[2:])
    rows = rows.index_select(1, source_row.clamp(min=0))
    return torch.where(source_row[:, None, None] >= 0, lerp(x, rows, ratio), x)


# q <- rope(rms_norm(q));   k <- rope(lerp_tokens(rms_norm(k)));   v <- lerp_tokens(v)
def qk_norm_rope_kv_lerp_(
    q: Tensor,  # [B, N, C], mutated
    k: Tensor,  # [B, N, C], mutated
    v: Tensor,  # [B, N, C], mutated
    q_weight: Tensor,  # [C]
    k_weight: Tensor,  # [C]
    cos: Tensor,  # [N, D]
    sin: Tensor,  # [N, D]
    k_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C], normalised and not yet rotated
    v_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C]
    source_row: Tensor,  # [N] int32
    ratio: Tensor,  # [B] fp32
    *,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
) -> None:
    """Normalises and rotates queries and keys and mixes the source rows into keys and values, in place."""
    heads = (-1, cos.shape[1])
    q.copy_(rope(rms_norm(q, q_weight, eps).unflatten(2, heads), cos, sin).flatten(2))
    mixed = lerp_tokens(rms_norm(k, k_weight, eps).unflatten(2, heads), k_source, source_row, ratio, k_scale, k_mean)
    k.copy_(rope(mixed, cos, sin).flatten(2))
    if v_source.shape[1] > 0:  # else v would be copied to itself, which torch refuses of some strides
        v.copy_(lerp_tokens(v.unflatten(2, heads), v_source, source_row, ratio, v_scale, v_mean).flatten(2))


# index[source_row[n]] = n
def index_of(source_row: Tensor, rows: int) -> Tensor:
    """The token of each row, [rows] int32: the inverse of `source_row`."""
    tokens = torch.arange(len(source_row), dtype=torch.int32, device=source_row.device)
    slot = torch.where(source_row < 0, rows, source_row)  # tokens without a row meet in one slot more
    return tokens.new_zeros(rows + 1).scatter_(0, slot.long(), tokens)[:rows]


# q <- rope(rms_norm(q));   k <- rope(rms_norm(k));   packed = pack_kv of rms_norm(k) and of v, of the tokens with a row
def qk_norm_rope_kv_pack_(
    q: Tensor,  # [B, N, C], mutated
    k: Tensor,  # [B, N, C], mutated
    v: Tensor,  # [B, N, C]
    q_weight: Tensor,  # [C]
    k_weight: Tensor,  # [C]
    cos: Tensor,  # [N, D]
    sin: Tensor,  # [N, D]
    source_row: Tensor,  # [N] int32
    rows: int,
    dtype: torch.dtype,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalises and rotates queries and keys in place; k data, k scale, v data, v scale as `pack_kv` gives them."""
    heads, index = (-1, cos.shape[1]), index_of(source_row, rows)
    q.copy_(rope(rms_norm(q, q_weight, eps).unflatten(2, heads), cos, sin).flatten(2))
    normed = rms_norm(k, k_weight, eps).unflatten(2, heads)
    k.copy_(rope(normed, cos, sin).flatten(2))
    return *pack_kv(normed, index, dtype), *pack_kv(v.unflatten(2, heads), index, dtype)
