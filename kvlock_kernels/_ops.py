"""Contracts of the operators: schema, shape inference, and the implementation for each device.

The reference is registered under the lowest-priority key of the dispatcher and serves every device that has nothing
better; CUDA has the kernels. Where the extension was built, it serves some operators on the CPU and on CUDA, and what
would serve CUDA without it becomes the operator's fallback, which the extension calls on a GPU that it has no code for.
Where a gradient is asked for, the reference serves what changes tensors in place, because autograd follows it alone.
No result aliases an argument; where a tensor is missing, an empty one returns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlock_kernels import _cuda, _extension, reference

NAMESPACE = "kvlock_kernels"
CONTRACTS: dict[str, str] = {}  # schemas by the names of the operators
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its implementations last as long as it does

_PAIR_OPTIONS = "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_mean=None, Tensor? v_mean=None"


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _attention_shapes(q: Tensor, *args: Any, return_lse: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    b, m, h, _ = q.shape
    lse_shape = (b, h, m) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _variance_shape(x0: Tensor, history: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return history.new_empty(x0.shape[0])


def _schedule_shapes(variance: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return variance.new_empty(variance.shape), variance.new_empty(variance.shape)


def _velocity_shapes(cond: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = torch.float32
    return (
        cond.new_empty(cond.shape),
        cond.new_empty(cond.shape[0], dtype=fp32),
        cond.new_empty(cond.shape, dtype=fp32),
    )


def _packed_shapes(x: Tensor, index: Tensor, dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, Tensor]:
    b, _, h, d = x.shape
    rows = index.shape[0]
    scale_shape = (b, rows, h) if dtype in reference.EIGHT_BIT else (0,)
    return x.new_empty((b, rows, h, d), dtype=dtype), x.new_empty(scale_shape, dtype=torch.float32)


def _unpacked_shape(data: Tensor, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    return data.new_empty(data.shape, dtype=dtype)


def _recorded_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    source_row: Tensor,
    rows: int,
    dtype: torch.dtype,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = cos.shape[1]
    shape = (k.shape[0], rows, k.shape[2] // d, d)
    scale_shape = shape[:3] if dtype in reference.EIGHT_BIT else (0,)
    (k_data, v_data), (k_scale, v_scale) = (
        [k.new_empty(size, dtype=kind) for _ in "kv"] for size, kind in ((shape, dtype), (scale_shape, torch.float32))
    )
    return k_data, k_scale, v_data, v_scale


def _in_place(operator: torch._ops.OpOverload, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the changes in place, as autograd wants it of torch's own operators; with gradients, `plain` serves."""
    aliases = [argument.alias_info for argument in operator._schema.arguments]
    changed = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def counted(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            return plain(*args, **kwargs)
        torch.autograd.graph.increment_version([args[i] for i in changed])
        with torch._C._AutoDispatchBelowADInplaceOrView():  # the reference would count once more
            return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    return counted


def _define(schema: str, plain: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    name, signature = schema.split("(", 1)
    CONTRACTS[name] = schema
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", plain)  # "default" is CompositeExplicitAutograd
    torch.library.register_fake(qualified, shapes)
    if name.endswith("_"):
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        _library.impl(name, _in_place(operator, plain), "ADInplaceOrView", with_keyset=True)


_define(
    "kv_lerp_(Tensor(a!) x, Tensor source, Tensor index, Tensor ratio, *, "
    "Tensor? source_scale=None, Tensor? source_mean=None) -> ()",
    reference.kv_lerp_,
    _nothing,
)
_define(
    "kv_lerp_pair_(Tensor(a!) k, Tensor(b!) v, Tensor k_source, Tensor v_source, Tensor index, Tensor ratio, *, "
    f"{_PAIR_OPTIONS}) -> ()",
    reference.kv_lerp_pair_,
    _nothing,
)
_define(
    "kv_lerp_attention(Tensor q, Tensor k, Tensor v, Tensor k_source, Tensor v_source, Tensor index, Tensor ratio, *, "
    f"float scale, {_PAIR_OPTIONS}, bool return_lse=False) -> (Tensor, Tensor)",
    reference.kv_lerp_attention,
    _attention_shapes,
)
_define(
    "kv_lerp_attention_(Tensor q, Tensor(a!) k, Tensor(b!) v, Tensor k_source, Tensor v_source, Tensor index, "
    f"Tensor ratio, *, float scale, {_PAIR_OPTIONS}) -> Tensor",
    reference.kv_lerp_attention_,
    lambda q, *args, **kwargs: q.new_empty(q.shape),
)
_define(
    "windowed_variance_(Tensor x0, Tensor(a!) history, Tensor step, *, Tensor? weight=None) -> Tensor",
    reference.windowed_variance_,
    _variance_shape,
)
_define(
    "lock_schedule(Tensor variance, Tensor guidance_scale, *, float tau, float boost, float alpha_min)"
    " -> (Tensor, Tensor)",
    reference.lock_schedule,
    _schedule_shapes,
)
_define(
    "guided_velocity(Tensor cond, Tensor? uncond, Tensor guidance_scale, Tensor x, Tensor sigma, *, "
    "Tensor? mask=None, float? background_guidance=None, bool optimized_scale=True, Tensor? x_scale=None, "
    "float eps=1e-8) -> (Tensor, Tensor, Tensor)",
    reference.guided_velocity,
    _velocity_shapes,
)
_define(
    "pack_kv(Tensor x, Tensor index, ScalarType dtype, *, Tensor? mean=None) -> (Tensor, Tensor)",
    reference.pack_kv,
    _packed_shapes,
)
_define(
    "unpack_kv(Tensor data, Tensor? scale, *, Tensor? mean=None, ScalarType dtype) -> Tensor",
    reference.unpack_kv,
    _unpacked_shape,
)

_define(
    "qk_norm_rope_kv_lerp_(Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, Tensor q_weight, Tensor k_weight, Tensor cos, "
    "Tensor sin, Tensor k_source, Tensor v_source, Tensor source_row, Tensor ratio, *, float eps, "
    f"{_PAIR_OPTIONS}) -> ()",
    reference.qk_norm_rope_kv_lerp_,
    _nothing,
)
_define(
    "qk_norm_rope_kv_pack_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, "
    "Tensor sin, Tensor source_row, SymInt rows, ScalarType dtype, *, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.qk_norm_rope_kv_pack_,
    _recorded_shapes,
)

ops = getattr(torch.ops, NAMESPACE)
_extension.load(CONTRACTS)

for _name in _cuda.OPERATORS:
    _qualified = f"{NAMESPACE}::{_name}"
    if _extension.serves(_qualified, "CUDA"):
        _signature = str(getattr(ops, _name).default._schema).removeprefix(_qualified)
        _qualified = f"{NAMESPACE}::fallback_{_name}"
        torch.library.define(_qualified, _signature)
    torch.library.impl(_qualified, "cuda", _cuda.implementation(_name))
