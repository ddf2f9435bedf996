"""Runs the Triton kernels on CPU tensors behind the operators, through Triton's interpreter."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from serving import served
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from kvlock_kernels import _cuda
from kvlock_kernels._triton import persistent


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Registers every kernel for the CPU, as it is registered for CUDA, until the block is left."""
    # Programs run one after the other, so that one must not wait for the next.
    alone = mock.patch.object(persistent, "resident_programs", lambda device: 1)
    oldest = mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: _cuda.OLDEST)
    # The interpreter computes in numpy, which warns of NaN and inf where a GPU goes on.
    quiet = np.errstate(all="ignore")
    with alone, oldest, bf16_as_on_a_gpu(), undefined_is_nan(), sooner(), quiet, served(_cuda.launchers()):
        yield


@contextlib.contextmanager
def sooner() -> Iterator[None]:
    """Has the interpreter do once, or for a whole block, what it does at every call and for every number.

    It puts its operations into triton.language whenever a kernel calls a function, makes a table of all dtypes to look
    one up, and calls a function that reduces a block with two numbers at a time.
    """
    known: dict[str, np.dtype] = {}
    look_up, nothing = interpreter._get_np_dtype, SimpleNamespace(restore=lambda: None)

    def np_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    languages = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with (
        mock.patch.object(interpreter, "_patch_lang", lambda function: nothing),
        mock.patch.object(interpreter, "_get_np_dtype", np_dtype),
        mock.patch.object(ReduceOps, "generic_reduce", reduced_by_halves),
    ):
        try:
            yield
        finally:
            languages.restore()


def reduced_by_halves(self: ReduceOps, blocks: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """One block reduced along an axis by a function that takes two blocks, in a tree as on a GPU."""
    (block,), axis = blocks, self.axis
    data = block.handle.data
    while data.shape[axis] > 1:
        data = self.combine_fn.fn(*(self.to_tensor(half, block.dtype) for half in np.split(data, 2, axis))).handle.data
    return [self.to_tensor(data if self.keep_dims else data.squeeze(axis), block.dtype)]


@contextlib.contextmanager
def undefined_is_nan() -> Iterator[None]:
    """Fills what a masked load without `other` leaves undefined with NaN, or -1; the interpreter has zeros there."""
    original = InterpreterBuilder.create_masked_load

    def load(self: Any, ptrs: TensorHandle, mask: Any, other: TensorHandle | None, *hints: Any) -> TensorHandle:
        if other is None:
            dtype = ptrs.get_element_ty()
            values = np.zeros(ptrs.data.shape, interpreter._get_np_dtype(dtype))
            values.view(np.uint8)[...] = 0xFF
            other = TensorHandle(values, dtype)
        return original(self, ptrs, mask, other, *hints)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", load):
        yield


@contextlib.contextmanager
def bf16_as_on_a_gpu() -> Iterator[None]:
    """Rounds fp32 to bf16 to nearest even, widens subnormal bf16 and multiplies bf16 values, as every GPU does.

    The interpreter keeps bf16 as codes in uint16: it cuts the bits off, widens subnormal numbers to others, and tl.dot
    multiplies the codes.
    """
    original = {name: vars(InterpreterBuilder)[name] for name in ("cast_impl", "create_fp_trunc", "create_dot")}

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32))
            codes = values.to(torch.bfloat16).view(torch.uint16).numpy().reshape(src.data.shape)
            return TensorHandle(codes, tl.bfloat16)
        if dst_type.scalar == tl.float32:
            src = decoded(src)
        return original["cast_impl"](self, src, dst_type)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *options: Any) -> TensorHandle:
        return original["create_dot"](self, decoded(a), decoded(b), *options)

    repaired = {"cast_impl": cast_impl, "create_fp_trunc": cast_impl, "create_dot": create_dot}
    for name, method in repaired.items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in original.items():
            setattr(InterpreterBuilder, name, method)


def decoded(x: TensorHandle) -> TensorHandle:
    """The values of a bf16 block in fp32, of which bf16 is the upper half; other blocks as they are."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
