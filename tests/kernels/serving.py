"""Puts other implementations behind the operators."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kvlock_kernels import _cuda, _extension

# What the extension serves on CUDA, in front of the Triton kernels: without its CUDA part nothing.
ON_CUDA = [name for name in _cuda.OPERATORS if _extension.serves(f"kvlock_kernels::fallback_{name}", "CUDA")]


@contextlib.contextmanager
def served(implementations: Mapping[str, Callable[..., Any]], key: str = "CPU") -> Iterator[None]:
    """Registers implementations by their operators' names for a dispatch key, until the block is left."""
    library = torch.library.Library("kvlock_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, implementation in implementations.items():
            library.impl(name, implementation, key)
    try:
        yield
    finally:
        library._destroy()


def triton_on_cuda() -> contextlib.AbstractContextManager[None]:
    """Puts the Triton kernels in front of the extension on CUDA, until the block is left."""
    return served({name: _cuda.launchers()[name] for name in ON_CUDA}, "CUDA")
