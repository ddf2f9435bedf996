"""Plain attention, the yardstick: torch's backends, forced by name, and the kernels of other libraries."""

import importlib.machinery
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._case import Inputs, NotInstalled, Outputs, Provider
from kvlock_kernels._triton.plain import FLASH_2, FLASH_3, FLASH_4, FLASH_ATTENTION, flash_attention

BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA FLASH": SDPBackend.FLASH_ATTENTION,
    "SDPA EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
}
SM_90 = "kvlock sm_90"
FORCED = "SDPA cuDNN"  # the fastest of them on sm_90, which the ways that mix first are timed before


def forced(backend: SDPBackend) -> Callable[[Inputs], Outputs]:
    """Torch's attention by this backend or not at all."""

    def run(inputs: Inputs) -> Outputs:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, scale=inputs["scale"]).transpose(1, 2),)

    return run


def launcher(name: str, function: Callable[..., Tensor], *libraries: str, over: str = "") -> Provider:
    """A launcher called directly; it wants a GPU, and raises where that is too old."""
    return Provider(name, lambda inputs: (function(**inputs),), needs_gpu=True, libraries=libraries, over=over)


def without_rows(**inputs: Any) -> Tensor:
    """The kernel that mixes in its loop, with nothing to mix."""
    from kvlock_kernels._triton.in_loop import attend_in_loop

    return attend_in_loop(**inputs, **nothing(inputs["q"]))[0]


def persistent_without_rows(**inputs: Any) -> Tensor:
    """The one launch that mixes a head ahead, with nothing to mix."""
    from kvlock_kernels._triton.persistent import attend_persistently_

    return attend_persistently_(**inputs, **nothing(inputs["q"]))


def nothing(q: Tensor) -> Inputs:
    """Arguments that lock no row."""
    none, index = q[:, :0], torch.empty(0, dtype=torch.int32, device=q.device)
    return {"k_source": none, "v_source": none, "index": index, "ratio": torch.zeros(len(q), device=q.device)}


def hopper(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.hopper import attention

    return attention(**inputs, return_lse=False)[0]


def flex(inputs: Inputs) -> Outputs:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return (flex_attention(q, k, v, scale=inputs["scale"]).transpose(1, 2),)


def sage(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """int8 products of q and k: the check allows it more."""
    wants("sageattention")
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)


MODULES = {FLASH_2: "flash_attn.flash_attn_interface", FLASH_3: "flash_attn_interface", FLASH_4: "flash_attn.cute"}


def flash(name: str, **inputs: Any) -> Tensor:
    wants(MODULES[name])
    function = flash_attention(name)
    if function is None:
        FLASH_ATTENTION[name]()  # says why
        raise ImportError(f"{name} could not be imported")
    return function(**inputs)


def wants(module: str) -> None:
    """Raises NotInstalled where there is no such module; one that is there and broken is not kept silent."""
    package, _, inside = module.partition(".")
    found = importlib.util.find_spec(package)
    if found is not None and inside:  # looked for without importing the package, which another generation may own
        found = importlib.machinery.PathFinder.find_spec(module, found.submodule_search_locations or [])
    if found is None:
        raise NotInstalled(f"there is no {module}")


PLAIN = (
    *(
        Provider(name, forced(backend), needs_gpu=True, libraries=("cudnn" if name == "SDPA cuDNN" else "torch",))
        for name, backend in BACKENDS.items()
    ),
    Provider("FlexAttention", flex, compiled=True, needs_gpu=True, libraries=("torch",)),
    launcher("SageAttention", sage, "sageattention")._replace(roundings=16),
    launcher(FLASH_2, partial(flash, FLASH_2), "flash-attn"),
    launcher(FLASH_3, partial(flash, FLASH_3), "flash-attn-3"),
    launcher(FLASH_4, partial(flash, FLASH_4), "flash-attn-4"),
    launcher("kvlock in loop, no rows", without_rows, "triton"),
    launcher("one launch, no rows", persistent_without_rows, "triton"),
    launcher(SM_90, hopper, "triton"),
)
CORE = ("SDPA cuDNN", "SDPA FLASH", "FlexAttention", "SageAttention", SM_90)
