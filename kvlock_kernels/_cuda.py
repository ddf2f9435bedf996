"""The implementation of each operator on CUDA: a Triton kernel where one serves the call, the reference where not."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from kvlock_kernels import reference
from kvlock_kernels._triton import Unsupported

Launcher = Callable[..., Any]
OPERATORS = (
    "kv_lerp_",
    "kv_lerp_pair_",
    "kv_lerp_attention",
    "kv_lerp_attention_",
    "windowed_variance_",
    "lock_schedule",
    "guided_velocity",
    "pack_kv",
    "unpack_kv",
    "qk_norm_rope_kv_lerp_",
    "qk_norm_rope_kv_pack_",
)
OLDEST = (8, 0)  # compute capability of the oldest GPU the kernels are compiled for in the tests


@functools.cache
def launchers() -> dict[str, Launcher]:
    """The launcher of each operator's kernel, by the operator's name; the first call imports Triton.

    Raises:
        ImportError: Triton is not installed.
    """
    from kvlock_kernels._triton import attend, guidance, lerp, norm_rope, packing, variance

    return {
        "kv_lerp_": lerp.kv_lerp_,
        "kv_lerp_pair_": lerp.kv_lerp_pair_,
        "kv_lerp_attention": attend.kv_lerp_attention,
        "kv_lerp_attention_": attend.kv_lerp_attention_,
        "windowed_variance_": variance.windowed_variance_,
        "lock_schedule": variance.lock_schedule,
        "guided_velocity": guidance.guided_velocity,
        "pack_kv": packing.pack_kv,
        "unpack_kv": packing.unpack_kv,
        "qk_norm_rope_kv_lerp_": norm_rope.qk_norm_rope_kv_lerp_,
        "qk_norm_rope_kv_pack_": norm_rope.qk_norm_rope_kv_pack_,
    }


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why no kernel runs on this device, or None."""
    if torch.version.hip:
        return "the kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    try:
        launchers()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    try:
        start_triton()
    except Exception as error:  # what it raises differs with what is missing
        return f"Triton cannot be started ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def start_triton() -> None:
    """Lets Triton build what it reaches the GPU through, for which it wants a C compiler."""
    from triton.runtime import driver

    driver.active.get_current_target()


@functools.cache
def warn_of(device: torch.device, reason: str) -> None:
    """Warns once that this device has no kernels, whichever operators are called on it."""
    warnings.warn(f"the operators run as plain PyTorch on {device}: {reason}", RuntimeWarning, stacklevel=3)


def implementation(name: str) -> Launcher:
    """What the dispatcher calls for operator `name` on CUDA; a fallback to the reference warns with its reason."""
    plain = getattr(reference, name)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device
        reason = why_not(device)
        if reason is None:
            try:
                with torch.cuda.device(device):
                    return launchers()[name](*args, **kwargs)
            except Unsupported as unsupported:
                warnings.warn(f"{name} runs as plain PyTorch: {unsupported}", RuntimeWarning, stacklevel=2)
        else:
            warn_of(device, reason)
        return plain(*args, **kwargs)

    return on_cuda
