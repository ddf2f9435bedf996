"""Puts other implementations behind the operators on the CPU."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


@contextlib.contextmanager
def served_on_cpu(implementations: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Registers implementations by their operators' names for the CPU, until the block is left."""
    library = torch.library.Library("kvlock_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, implementation in implementations.items():
            library.impl(name, implementation, "CPU")
    try:
        yield
    finally:
        library._destroy()
