"""Public operators: each documents its shapes, checks its arguments once and calls the registered implementation.

Letters: B samples, N keys, M queries, H heads, D head dimension, C = H * D, W slots of the ring, rows = len(index).
"floating" is fp32, bf16 or fp16. A wrong type, dtype, device or shape is a ValueError that says what was found and what
is wanted. Nothing here waits for the device: values that live in tensors (an index within N, no row twice, a ratio that
is a number) are trusted. No gradient is defined; a leaf that requires one is not changed in place, but refused as torch
refuses it. Results are contiguous and share no memory with the arguments, but for the tensors that `kv_lerp_` and
`kv_lerp_pair_` change in place and hand back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvlock_kernels._checks import (
    EIGHT_BIT,
    FLOATING,
    check_bool,
    check_broadcast,
    check_index,
    check_lerp,
    check_mean,
    check_ndim,
    check_number,
    check_packing,
    check_per_sample,
    check_shape,
    check_tensor,
    check_writable,
    refuse,
)
from kvlock_kernels._ops import ops


class LerpedPair(NamedTuple):
    """Keys and values after the lerp: the very tensors that were passed in."""

    k: Tensor  # [B, N, H, D] or [B, N, C]
    v: Tensor  # [B, N, H, D] or [B, N, C]


class LockSchedule(NamedTuple):
    """Lock strength and guidance of the next step."""

    fusion_ratio: Tensor  # [B] fp32 in [alpha_min, 1]
    guidance_scale: Tensor  # [B] fp32


class GuidedVelocity(NamedTuple):
    """Guided velocity, the optimised scale behind it and the clean sample it points to."""

    velocity: Tensor  # [B, ...] in cond's dtype
    s_star: Tensor  # [B] fp32
    x0: Tensor  # [B, ...] fp32


class PackedRows(NamedTuple):
    """Rows in their storage dtype; row ~ data * scale (+ mean)."""

    data: Tensor  # [B, rows, H, D]
    scale: Tensor | None  # [B, rows, H] fp32 for 8-bit data


def kv_lerp_(
    x: Tensor,  # [B, N, H, D] or [B, N, C] floating, any strides that do not overlap, changed in place
    source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C] floating, float8_e4m3fn or int8; Bs is 1 or B
    index: Tensor,  # [rows] int32, no row twice
    ratio: Tensor,  # [B] fp32
    *,
    source_scale: Tensor | None = None,  # [Bs, rows, H] fp32, with 8-bit rows and only with them
    source_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32, with 8-bit rows only
) -> Tensor:
    """Mixes source rows into rows `index` of x, in place, and returns x.

        x[b, index[i]] = (1 - ratio[b]) * x[b, index[i]] + ratio[b] * s[b, i]
        s = source * source_scale + source_mean

    in fp32, rounded once to x's dtype. The ends are selected, not computed: ratio <= 0 leaves the row bit for bit and
    ratio >= 1 gives s in x's dtype bit for bit, whatever NaN the other side holds. A NaN ratio gives NaN rows.
    The rows of x that come from source at ratio 1, with index = [1, 2, 5] and N = 6:

        row of x       0  1  2  3  4  5
        from source    0  1  1  0  0  1        # rows 0, 1, 2 of source, in the order of index

    Source rows [Bs, rows, H, D] fit x [B, N, C] too, where C = H * D. Without rows or samples nothing happens. x and
    source share no memory.
    """
    check_lerp(("x", "source", "source_scale", "source_mean"), x, source, index, ratio, source_scale, source_mean)
    ops.kv_lerp_(x, source, index, ratio, source_scale=source_scale, source_mean=source_mean)
    return x


def kv_lerp_pair_(
    k: Tensor,  # [B, N, H, D] or [B, N, C] floating, changed in place
    v: Tensor,  # like k, with its own H, D if need be; changed in place
    k_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C]
    v_source: Tensor,  # [Bs, rows, H, D] or [Bs, rows, C]
    index: Tensor,  # [rows] int32, no row twice
    ratio: Tensor,  # [B] fp32
    *,
    k_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    v_scale: Tensor | None = None,  # [Bs, rows, H] fp32
    k_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
    v_mean: Tensor | None = None,  # [1 or Bs, H, D] fp32
) -> LerpedPair:
    """Does `kv_lerp_` to keys and values at once, in place, and returns both.

    k and v share no memory, with each other or with a source.
    """
    check_lerp(("k", "k_source", "k_scale", "k_mean"), k, k_source, index, ratio, k_scale, k_mean)
    check_lerp(("v", "v_source", "v_scale", "v_mean"), v, v_source, index, ratio, v_scale, v_mean)
    ops.kv_lerp_pair_(
        k, v, k_source, v_source, index, ratio, k_scale=k_scale, v_scale=v_scale, k_mean=k_mean, v_mean=v_mean
    )
    return LerpedPair(k, v)


def windowed_variance_(
    x0: Tensor,  # [B, ...] floating
    history: Tensor,  # [W, B, ...] fp32, W >= 1, changed in place
    step: Tensor,  # [] or [1] int64, >= 0, on x0's device
    *,
    weight: Tensor | None = None,  # broadcastable to x0, bool or floating, >= 0
) -> Tensor:
    """Writes x0 to slot step % W of the ring and returns the weighted mean of the variance over time: [B] fp32.

        var[b, i] = sum_j (history[j, b, i] - mean)^2 / (n - 1),    n = min(step + 1, W)
        result[b] = sum_i weight[b, i] * var[b, i] / sum_i weight[b, i]

    The slots in use with W = 4 (1 = read, x = written and read); the others may hold anything, NaN included:

        step 0    x 0 0 0        n = 1: the result is 0 by definition
        step 2    1 1 x 0        n = 3
        step 5    1 x 1 1        n = 4

    n < 2 gives 0 by definition, and so do weights that sum to 0 (an empty x0 among them). An element of weight 0 does
    not count, even where it is NaN; any other NaN makes its sample's result NaN. `step` is not advanced: a second call
    with the same x0 and step writes the same slot again, so that a masked and a global variance can share one ring.
    """
    check_tensor("x0", x0, FLOATING)
    if x0.ndim == 0:
        raise refuse("x0", "shape []", "[B, ...]")
    check_tensor("history", history, (torch.float32,), x0)
    if history.ndim != x0.ndim + 1 or history.shape[0] == 0 or history.shape[1:] != x0.shape:
        wanted = ", ".join(str(size) for size in x0.shape)
        raise refuse("history", f"shape {list(history.shape)}", f"[W, B, ...] = [W >= 1, {wanted}]")
    check_writable("history", history)
    check_tensor("step", step, (torch.int64,), x0)
    check_shape("step", step, "[] or [1]", (), (1,))
    if weight is not None:
        check_tensor("weight", weight, (torch.bool, *FLOATING), x0)
        check_broadcast("weight", weight, tuple(x0.shape))
    return ops.windowed_variance_(x0, history, step, weight=weight)


def lock_schedule(
    variance: Tensor,  # [B] fp32
    guidance_scale: Tensor,  # [] or [B] fp32, the base scale
    *,
    tau: float = 0.01,
    boost: float = 2.0,
    alpha_min: float = 0.0,
) -> LockSchedule:
    """Maps the variance to the fusion ratio and the guidance scale of the next step, both [B] fp32.

        fusion_ratio   = clamp(variance / tau, alpha_min, 1)
        guidance_scale = guidance_scale * clamp(variance / tau, 1, boost)

    The ratio is partial below tau, where the guidance keeps its base; above tau the lock is full and the guidance grows
    up to `boost` times. A NaN variance gives NaN for both: the sample is lost already, and this shows it.
    """
    check_tensor("variance", variance, (torch.float32,))
    check_ndim("variance", variance, "[B]", 1)
    check_per_sample("guidance_scale", guidance_scale, variance.shape[0], variance)
    check_number("tau", tau, "a finite number above 0", 0.0, above=True)
    check_number("boost", boost, "a finite number of at least 1", 1.0)
    check_number("alpha_min", alpha_min, "a number in [0, 1]", 0.0, 1.0)
    return LockSchedule(
        *ops.lock_schedule(
            variance, guidance_scale, tau=float(tau), boost=float(boost), alpha_min=float(alpha_min)
        )
    )


def guided_velocity(
    cond: Tensor,  # [B, ...] floating
    uncond: Tensor | None,  # [B, ...] floating
    guidance_scale: Tensor,  # [] or [B] fp32
    x: Tensor,  # [B, ...] floating
    sigma: Tensor,  # [] or [B] fp32
    *,
    mask: Tensor | None = None,  # broadcastable to x, bool or floating, nonzero = inside
    background_guidance: float | None = None,
    optimized_scale: bool = True,
    x_scale: Tensor | None = None,  # [] or [B] fp32, 1 by default
    eps: float = 1e-8,
) -> GuidedVelocity:
    """Combines the two predictions of classifier-free guidance, with an optimised scale per sample.

        s*       = <cond, uncond> / (|uncond|^2 + eps)       over all elements of a sample; 1 unless optimized_scale
        velocity = (1 - w) * s* * uncond + w * cond          cond bit for bit where w == 1
        x0       = x_scale * x - sigma * velocity            from the fp32 velocity, before it is cast to cond's dtype

    w is guidance_scale inside the mask and background_guidance outside it; without background_guidance it is
    guidance_scale everywhere and the mask has no effect. With guidance 5 and background_guidance 1:

        mask    0 1 1 0        w    1 5 5 1

    Without uncond there is nothing to guide: velocity is cond bit for bit and s* is 1. An empty x gives empty results.
    """
    check_tensor("cond", cond, FLOATING)
    if cond.ndim == 0:
        raise refuse("cond", "shape []", "[B, ...]")
    b, shape = cond.shape[0], tuple(cond.shape)
    if uncond is not None:
        check_tensor("uncond", uncond, FLOATING, cond)
        check_shape("uncond", uncond, "the shape of cond", shape)
    check_per_sample("guidance_scale", guidance_scale, b, cond)
    check_tensor("x", x, FLOATING, cond)
    check_shape("x", x, "the shape of cond", shape)
    check_per_sample("sigma", sigma, b, cond)
    if mask is not None:
        check_tensor("mask", mask, (torch.bool, *FLOATING), cond)
        check_broadcast("mask", mask, shape)
    if background_guidance is not None:
        check_number("background_guidance", background_guidance, "a finite number or None")
        if mask is None:
            raise refuse("mask", "None", "a mask, because background_guidance acts outside it")
    if x_scale is not None:
        check_per_sample("x_scale", x_scale, b, cond)
    check_bool("optimized_scale", optimized_scale)
    check_number("eps", eps, "a finite number above 0", 0.0, above=True)
    return GuidedVelocity(
        *ops.guided_velocity(
            cond,
            uncond,
            guidance_scale,
            x,
            sigma,
            mask=mask,
            background_guidance=None if background_guidance is None else float(background_guidance),
            optimized_scale=optimized_scale,
            x_scale=x_scale,
            eps=float(eps),
        )
    )


def pack_kv(
    x: Tensor,  # [B, N, H, D] floating, D >= 1
    index: Tensor,  # [rows] int32
    dtype: torch.dtype,  # bfloat16, float16, float32, float8_e4m3fn or int8
    *,
    mean: Tensor | None = None,  # [1 or B, H, D] fp32, with 8-bit dtypes only
) -> PackedRows:
    """Gathers rows `index` of x in a storage dtype: data [B, rows, H, D], and for 8 bit scale [B, rows, H] fp32.

        scale = max_d |x - mean| / limit,    data = round((x - mean) * (1 / scale))    limit: 448 for e4m3, 127 for int8

    A floating dtype is a plain cast, with scale None. A row of zeros, or of numbers so small that its scale would be no
    normal fp32 number, has scale 1 and zeros as data. Both 8-bit dtypes round to nearest even and stay within their
    limit. A row that holds inf or NaN has a non-finite scale and no finite value left. Keep `mean`:
    `unpack_kv` and `kv_lerp_` must add the same one back.
    """
    check_tensor("x", x, FLOATING)
    check_ndim("x", x, "[B, N, H, D]", 4)
    if x.shape[3] == 0:
        raise refuse("x", f"shape {list(x.shape)}", "[B, N, H, D] with D >= 1")
    check_index(index, x.shape[1], x)
    if dtype not in (*FLOATING, *EIGHT_BIT):
        raise refuse("dtype", repr(dtype), "bfloat16, float16, float32, float8_e4m3fn or int8")
    if mean is not None:
        if dtype not in EIGHT_BIT:
            raise refuse("mean", "a value", f"None, because dtype is {dtype} and not 8-bit")
        check_mean("mean", mean, x)
    data, scale = ops.pack_kv(x, index, dtype, mean=mean)
    return PackedRows(data, scale if dtype in EIGHT_BIT else None)


def unpack_kv(
    data: Tensor,  # [B, rows, H, D] floating, float8_e4m3fn or int8
    scale: Tensor | None = None,  # [B, rows, H] fp32, with 8-bit data and only with it
    *,
    mean: Tensor | None = None,  # [1 or B, H, D] fp32, with 8-bit data only
    dtype: torch.dtype = torch.float32,  # floating
) -> Tensor:
    """Decodes packed rows to a new tensor [B, rows, H, D]: data * scale + mean in fp32, rounded once to dtype."""
    check_tensor("data", data, (*FLOATING, *EIGHT_BIT))
    check_ndim("data", data, "[B, rows, H, D]", 4)
    if dtype not in FLOATING:
        raise refuse("dtype", repr(dtype), "float32, bfloat16 or float16")
    check_packing(("data", "scale", "mean"), data, scale, mean)
    return ops.unpack_kv(data, scale, mean=mean, dtype=dtype)
