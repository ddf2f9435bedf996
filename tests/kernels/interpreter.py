"""Runs the Triton kernels on CPU tensors behind the operators, through Triton's interpreter."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kvlock_kernels import _cuda


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Registers every kernel for the CPU, as it is registered for CUDA, until the block is left."""
    library = torch.library.Library("kvlock_kernels", "IMPL")
    # The interpreter computes in numpy, which warns of NaN and inf where a GPU goes on.
    with rounding_as_a_gpu(), np.errstate(all="ignore"):
        for name, launcher in _cuda.launchers().items():
            library.impl(name, launcher, "CPU")
        try:
            yield
        finally:
            library._destroy()


@contextlib.contextmanager
def rounding_as_a_gpu() -> Iterator[None]:
    """Rounds fp32 to bf16 to nearest even, as every GPU does; the interpreter cuts the bits off."""
    original = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32))
            codes = values.to(torch.bfloat16).view(torch.uint16).numpy().reshape(src.data.shape)
            return TensorHandle(codes, tl.bfloat16)
        return original(self, src, dst_type)

    methods = ("cast_impl", "create_fp_trunc")
    before = {name: vars(InterpreterBuilder)[name] for name in methods}
    for name in methods:
        setattr(InterpreterBuilder, name, cast_impl)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)
