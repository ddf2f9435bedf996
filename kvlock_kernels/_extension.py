"""The compiled extension, an object file beside this one where it was built; loading it adds its implementations."""

import ctypes
import warnings
from pathlib import Path

import torch

BUILD = "pip install --no-build-isolation -e ."


def path() -> Path | None:
    """Where the extension is, or None if it was not built."""
    built = Path(__file__).with_name("_C.so")
    return built if built.exists() else None


def load() -> None:
    """Registers what the extension implements, where it was built; one that torch cannot load warns with the reason."""
    built = path()
    if built is None:
        return
    try:
        torch.ops.load_library(str(built))
    except OSError as error:
        warnings.warn(f"{built} cannot be loaded ({error}); build it again: {BUILD}", RuntimeWarning, stacklevel=2)


def serves(name: str, key: str) -> bool:
    """Whether operator `name` exists and has an implementation under the dispatch key itself, "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def architectures() -> list[str]:
    """The GPU architectures that the extension has code for, such as "9.0"; none where only the CPU part was built."""
    function = ctypes.CDLL(str(path())).kvlock_architectures
    function.restype = ctypes.c_char_p
    return function().decode().split(";") if function() else []


def has_code_for(device: int) -> bool:
    """Whether the extension has code for this GPU."""
    return bool(ctypes.CDLL(str(path())).kvlock_serves(device))
