"""The compiled extension, an object file beside this one where it was built; loading it adds its implementations."""

import ctypes
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

BUILD = "pip install --no-build-isolation -e ."
ON_CUDA = ("pack_kv", "unpack_kv", "kv_lerp_")
OPERATORS = (*ON_CUDA, "kv_lerp_pair_")  # on the CPU; on CUDA Triton mixes both tensors in one launch


def path() -> Path | None:
    """Where the extension is, or None if it was not built."""
    built = Path(__file__).with_name("_C.so")
    return built if built.exists() else None


def in_an_object(contracts: Mapping[str, str]) -> bytes:
    """What stands in an object that was built for these contracts, the operators' schemas by their names."""
    return "\n".join(["kvlock_kernels", *(contracts[name] for name in OPERATORS)]).encode() + b"\0"


def load(contracts: Mapping[str, str]) -> None:
    """Registers what the extension implements, where it was built; one that does not fit the contracts only warns."""
    built = path()
    if built is None:
        return
    try:
        # Loading registers. A function that takes its arguments for others would read wild memory when it is called.
        if in_an_object(contracts) not in built.read_bytes():
            raise OSError("it was built for other operators than these")
        torch.ops.load_library(str(built))
    except OSError as error:
        warnings.warn(
            f"{built} cannot be loaded ({error}); PyTorch and Triton serve instead; build it again: {BUILD}",
            RuntimeWarning,
            stacklevel=2,
        )


def serves(name: str, key: str) -> bool:
    """Whether operator `name` exists and has an implementation under the dispatch key itself, "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def architectures() -> list[str]:
    """The GPU architectures that the loaded extension has code for, such as "9.0"; none without a CUDA part."""
    if not serves("kvlock_kernels::pack_kv", "CPU"):
        return []  # not loaded, and looking into it would load it
    function = ctypes.CDLL(str(path())).kvlock_architectures
    function.restype = ctypes.c_char_p
    return function().decode().split(";") if function() else []


def has_code_for(device: int) -> bool:
    """Whether the extension has code for this GPU."""
    return bool(ctypes.CDLL(str(path())).kvlock_serves(device))
