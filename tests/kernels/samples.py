"""Inputs of the kernel tests: seeded normal tensors, the bits of NaN and one call of every operator."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvlock_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


class Call(NamedTuple):
    """One call of a public function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers from a seed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")  # the same on every device
    return x.to(torch.get_default_device(), dtype)


def int32(*rows: int) -> Tensor:
    """A row index."""
    return torch.tensor(rows, dtype=torch.int32)


def scattered(tokens: int, rows: int) -> Tensor:
    """An index of `rows` of the tokens in no order, as a caller is free to give it."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(7), device="cpu")
    return order[:rows].to(torch.get_default_device(), torch.int32)


def extreme_rows(dtype: torch.dtype) -> Tensor:
    """Rows [1, 9, 2, 24] from huge to subnormal and zero; the second head of each holds an ordinary number too."""
    sizes = torch.tensor([3e38, 1e30, 1.0, 1e-30, 1e-36, 1e-37, 1e-38, 1e-44, 0.0])
    x = (sizes[:, None] * normal(24).clamp(-1, 1)).reshape(1, len(sizes), 1, 24).repeat(1, 1, 2, 1)
    x[:, :, 1, 5] = 1.0
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def nan_with_payload(dtype: torch.dtype, *shape: int) -> Tensor:
    """A NaN that arithmetic and casts do not give back bit for bit."""
    code = {
        torch.float32: (torch.int32, -0x3FEDCB),
        torch.bfloat16: (torch.int16, -0x2B),
        torch.float16: (torch.int16, -0x12B),
    }
    integer, value = code[dtype]
    return torch.full(shape, value, dtype=integer).view(dtype)


def packed(
    dtype: torch.dtype, samples: int, rows: int, heads: int, dim: int, *, seed: int, mean: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Source rows in an 8-bit dtype: data, scale and perhaps the mean."""
    x = normal(samples, rows, heads, dim, seed=seed)
    average = x.mean(1) if mean else None
    data, scale = kvlock_kernels.pack_kv(x, torch.arange(rows, dtype=torch.int32), dtype, mean=average)
    assert scale is not None
    return data, scale, average


def source_rows(
    dtype: torch.dtype, samples: int, rows: int, h: int, d: int, *, mean: bool = False, seed: int = 1
) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    """Source rows [samples, rows, H, D], the options that go with them, and their values in float64."""
    if dtype in DTYPES:
        source = normal(samples, rows, h, d, seed=seed, dtype=dtype)
        return source, {}, source.double()
    data, scale, average = packed(dtype, samples, rows, h, d, seed=seed, mean=mean and rows > 0)
    decoded = data.double() * scale.double()[..., None] + (0 if average is None else average.double()[:, None])
    return data, {"source_scale": scale, "source_mean": average}, decoded


def _lerp() -> Call:
    return Call((normal(2, 7, 2, 4), normal(1, 3, 2, 4, seed=1), int32(6, 0, 3), torch.tensor([0.0, 0.3])), {})


def _lerp_flat_packed() -> Call:
    data, scale, mean = packed(torch.int8, 2, 3, 2, 4, seed=1, mean=True)
    args = (normal(2, 7, 8, dtype=torch.bfloat16), data, int32(6, 0, 3), torch.tensor([1.0, 0.3]))
    return Call(args, {"source_scale": scale, "source_mean": mean})


def _pair(dtype: torch.dtype) -> Call:
    k_data, k_scale, k_mean = packed(dtype, 1, 3, 2, 4, seed=1, mean=True)
    args = (normal(2, 7, 2, 4), normal(2, 7, 2, 4, seed=2), k_data, normal(2, 3, 2, 4, seed=3), int32(6, 0, 3))
    return Call((*args, torch.tensor([0.6, 0.3])), {"k_scale": k_scale, "k_mean": k_mean})


def _attention() -> Call:
    q, k, v = normal(2, 5, 2, 4), normal(2, 7, 2, 4, seed=1), normal(2, 7, 2, 4, seed=2)
    sources = (normal(1, 3, 2, 4, seed=3), normal(1, 3, 2, 4, seed=4))
    return Call((q, k, v, *sources, int32(6, 0, 3), torch.tensor([0.6, 0.3])), {})


def _attention_packed(dtype: torch.dtype) -> Call:
    k_data, k_scale, k_mean = packed(torch.int8, 2, 3, 2, 4, seed=3, mean=True)
    v_data, v_scale, _ = packed(dtype, 2, 3, 2, 4, seed=4)
    args = tuple(normal(2, 7, 2, 4, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "return_lse": True, "scale": 0.3}
    return Call((*args, k_data, v_data, int32(6, 0, 3), torch.tensor([0.6, 0.3])), options)


def _attention_in_place() -> Call:
    call = _attention_packed(INT8)
    del call.kwargs["return_lse"]
    return call


def _variance() -> Call:
    return Call((normal(2, 3, 4, 5), normal(4, 2, 3, 4, 5, seed=1), torch.tensor(6)), {})


def _variance_weighted() -> Call:
    weight = (normal(1, 1, 4, 5, seed=2) > 0).float()
    args = (normal(2, 3, 4, 5, dtype=torch.bfloat16), normal(4, 2, 3, 4, 5, seed=1), torch.tensor([2]))
    return Call(args, {"weight": weight})


def _schedule() -> Call:
    return Call((torch.tensor([0.001, 0.015, 0.3]), torch.tensor(5.0)), {"alpha_min": 0.2})


def _velocity() -> Call:
    args = (normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1), torch.tensor([5.0, 1.0]), normal(2, 3, 4, 5, seed=2))
    return Call((*args, torch.tensor(0.7)), {"mask": normal(1, 1, 4, 5, seed=3) > 0, "background_guidance": 2.0})


def _velocity_alone() -> Call:
    args = (normal(2, 3, 4, 5, dtype=torch.bfloat16), None, torch.tensor(5.0), normal(2, 3, 4, 5, seed=2))
    return Call((*args, torch.tensor([0.7, 0.2])), {"x_scale": torch.tensor([0.9, 0.8])})


def _pack(dtype: torch.dtype) -> Call:
    return Call((normal(2, 7, 2, 4), int32(6, 0, 3), dtype), {"mean": normal(1, 2, 4, seed=1)})


def _pack_cast() -> Call:
    return Call((normal(2, 7, 2, 4), int32(6, 0, 3), torch.float32), {})


def angles(tokens: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, D] of random angles, each twice side by side as diffusers' RoPE gives them."""
    angle = 3 * normal(tokens, dim // 2, seed=seed).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


def projections(b: int, n: int, h: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, the weights of their norms, cos and sin."""
    qkv = (normal(b, n, h * d, seed=seed, dtype=dtype) for seed in range(3))
    weights = (1 + 0.3 * normal(h * d, seed=seed) for seed in (3, 4))
    return *qkv, *(weight.to(dtype) for weight in weights), *angles(n, d, seed=5)


def _norm_rope() -> Call:
    sources = (normal(1, 3, 2, 4, seed=6), normal(1, 3, 8, seed=7))
    args = (*projections(2, 7, 2, 4), *sources, int32(1, -1, -1, 2, -1, -1, 0), torch.tensor([0.6, 1.0]))
    return Call(args, {"eps": 1e-6})


def _norm_rope_packed(dtype: torch.dtype) -> Call:
    k_data, k_scale, k_mean = packed(dtype, 2, 3, 2, 4, seed=6, mean=True)
    v_data, v_scale, _ = packed(dtype, 2, 3, 2, 4, seed=7)
    options = {"eps": 1e-6, "k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean}
    qkv = projections(2, 7, 2, 4, torch.bfloat16)
    return Call((*qkv, k_data, v_data, int32(1, -1, -1, 2, -1, -1, 0), torch.tensor([0.6, 0.3])), options)


def _norm_rope_pack(dtype: torch.dtype) -> Call:
    qkv = projections(2, 7, 2, 4, torch.bfloat16)
    return Call((*qkv, int32(1, -1, -1, 2, -1, -1, 0), 3, dtype), {"eps": 1e-6})


def _unpack(dtype: torch.dtype) -> Call:
    data, scale, mean = packed(dtype, 2, 3, 2, 4, seed=1, mean=True)
    return Call((data, scale), {"mean": mean, "dtype": torch.bfloat16})


def _unpack_cast() -> Call:
    return Call((normal(2, 3, 2, 4),), {})


INT8, FP8 = torch.int8, torch.float8_e4m3fn
CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "lerp": ("kv_lerp_", _lerp),
    "lerp-C8-bf16-int8-mean": ("kv_lerp_", _lerp_flat_packed),
    "pair-int8-mean": ("kv_lerp_pair_", partial(_pair, INT8)),
    "pair-fp8-mean": ("kv_lerp_pair_", partial(_pair, FP8)),
    "attention": ("kv_lerp_attention", _attention),
    "attention-bf16-int8-mean-lse": ("kv_lerp_attention", partial(_attention_packed, INT8)),
    "attention-bf16-fp8-mean-lse": ("kv_lerp_attention", partial(_attention_packed, FP8)),
    "attention-in-place-int8-mean": ("kv_lerp_attention_", _attention_in_place),
    "variance": ("windowed_variance_", _variance),
    "variance-bf16-weight": ("windowed_variance_", _variance_weighted),
    "schedule": ("lock_schedule", _schedule),
    "velocity-masked": ("guided_velocity", _velocity),
    "velocity-bf16-no-uncond": ("guided_velocity", _velocity_alone),
    "pack-int8-mean": ("pack_kv", partial(_pack, INT8)),
    "pack-fp8-mean": ("pack_kv", partial(_pack, FP8)),
    "pack-fp32": ("pack_kv", _pack_cast),
    "unpack-int8-mean": ("unpack_kv", partial(_unpack, INT8)),
    "unpack-fp8-mean": ("unpack_kv", partial(_unpack, FP8)),
    "unpack-fp32": ("unpack_kv", _unpack_cast),
    "norm-rope": ("qk_norm_rope_kv_lerp_", _norm_rope),
    "norm-rope-bf16-int8-mean": ("qk_norm_rope_kv_lerp_", partial(_norm_rope_packed, INT8)),
    "norm-rope-bf16-fp8-mean": ("qk_norm_rope_kv_lerp_", partial(_norm_rope_packed, FP8)),
    "norm-rope-pack-bf16": ("qk_norm_rope_kv_pack_", partial(_norm_rope_pack, torch.bfloat16)),
    "norm-rope-pack-int8": ("qk_norm_rope_kv_pack_", partial(_norm_rope_pack, INT8)),
    "norm-rope-pack-fp8": ("qk_norm_rope_kv_pack_", partial(_norm_rope_pack, FP8)),
}
