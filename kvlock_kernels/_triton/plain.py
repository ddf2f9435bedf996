"""Plain attention: the kernels there are, by name, and the call of the first that serves."""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.compiler.errors import CompilationError

OWN = "the kernel of this package for sm_90"
FLASH_2, FLASH_3, FLASH_4 = "flash-attn 2", "flash-attn 3", "flash-attn 4"
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # for what the others do not serve, such as fp32

ALIGNMENT = 16  # bytes between rows, and of the first


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kernels: tuple[str | SDPBackend, ...]) -> Tensor:
    """Attention of q [B, M, H, D] to k, v [B, N, H, D] by the first of `kernels` that serves: names before backends."""
    if scale < 0:  # kernels take the maximum before they multiply
        q, scale = -q, -scale
    if scale == 0:  # 0 * -inf is NaN: cuDNN scales what it has masked
        q, scale = 0 * q, 1.0  # NaN stays NaN
    for name in kernels:
        if name == OWN and (own := own_kernel(q, k, scale)) is not None:
            return own(q, k, v, scale=scale, return_lse=False)[0]
        if name in FLASH_ATTENTION and flash_serves(q, k, v) and (flash := flash_attention(name)) is not None:
            return flash(q, k, v, scale=scale)
    wider = torch.promote_types(q.dtype, k.dtype)
    queries, keys, values = (x.to(wider).transpose(1, 2) for x in (q, k, v))
    backends = sdpa_kernel([backend for backend in kernels if isinstance(backend, SDPBackend)], set_priority=True)
    with backends, torch.autocast(q.device.type, enabled=False):  # products in q's dtype, whatever surrounds the call
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
    return out.to(q.dtype).contiguous()


def own_kernel(q: Tensor, k: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel of this package for sm_90, where it serves."""
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return None
    hopper = compiled_hopper(q.dtype, *q.shape[2:])
    return None if hopper is None or hopper.why_not(q, k, scale) else hopper.attention


@functools.cache
def compiled_hopper(dtype: torch.dtype, heads: int, dim: int) -> ModuleType | None:
    """The module with the kernel for sm_90; None, and a warning, where this Triton does not compile it.

    It is written in Gluon, whose names move from one Triton to the next.
    """
    try:
        from kvlock_kernels._triton import hopper

        if dtype in hopper.DTYPES:
            hopper.compile_for(dtype, heads, dim)
    except Exception as error:  # what it raises differs with what is missing
        reason = f"Triton {triton.__version__} does not compile the kernel for sm_90 ({innermost(error)})"
        said = f"attention of {heads} heads of {dim} runs by other kernels: {reason}"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        return None
    return hopper


def innermost(error: BaseException) -> str:
    """The reason for an error, in one line. Triton's own begin with the place and quote code before they come to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if isinstance(error, CompilationError) else f"{type(error).__name__}: {lines[0]}"


@functools.cache  # an import that fails half-way is slow, and would be tried again at every call
def flash_attention(name: str) -> Callable[..., Tensor] | None:
    """FlashAttention of this generation, [B, N, H, D] with a keyword `scale`; None where it cannot be imported."""
    try:
        function = FLASH_ATTENTION[name]()
    except Exception:  # compiled for another torch, or above another version of what it stands on: it is not there
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        result = function(q, k, v, softmax_scale=scale)
        return result[0] if isinstance(result, tuple) else result  # some versions return the log-sum-exp too

    return run


def flash_attn_2() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    return flash_attn_func


def flash_attn_3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def flash_attn_4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


FLASH_ATTENTION = {FLASH_2: flash_attn_2, FLASH_3: flash_attn_3, FLASH_4: flash_attn_4}


def flash_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether every generation of FlashAttention takes these tensors."""
    dim, half = q.shape[3], q.dtype in (torch.float16, torch.bfloat16)
    dims = dim % 8 == 0 and (dim <= 128 or dim == 256)
    return half and dims and q.numel() > 0 < k.numel() and all(x.dtype == q.dtype and is_aligned(x) for x in (q, k, v))


def is_aligned(x: Tensor) -> bool:
    """Whether every row of a head can be read 16 bytes at a time."""
    steps = (step * x.element_size() for step in x.stride()[:3])
    return x.stride(3) == 1 and x.data_ptr() % ALIGNMENT == 0 and not any(step % ALIGNMENT for step in steps)
