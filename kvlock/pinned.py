"""Host memory that a CUDA device copies from and to by itself, pinned in the sizes that are asked for."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class PinnedMemory:
    """Pinned memory that is held until it is freed.

    torch's own takes powers of two of bytes, of which it gives none back to the system, and lets one thread find the
    pages: 49 ms for 128 MiB, where the layer whose keys go there computes for 20 ms.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}  # bytes, by their address
        weakref.finalize(self, _unpin_all, self._held).atexit = False  # then the system takes it

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory for a copy of `tensor`, whatever its device: a contiguous tensor of its shape and dtype.

        Raises:
            MemoryError: the host has not so much.
            RuntimeError: the device cannot use so much of it.
        """
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        with torch.inference_mode(False):  # a later call may be outside, and has to write to it
            memory = torch.frombuffer(_pages(tensor.nbytes), dtype=torch.uint8)
            memory.zero_()  # by all threads: a page is found when it is first touched
            pin(memory)
            self._held[memory.data_ptr()] = memory
            return memory.view(tensor.dtype).view(tensor.shape)

    def free(self, tensors: Iterable[Tensor | None]) -> None:
        """Give back what `empty_like` has given, once no copy of it is under way."""
        for tensor in tensors:
            memory = None if tensor is None else self._held.pop(tensor.data_ptr(), None)
            if memory is not None:
                unpin(memory)

    def free_all(self) -> None:
        """Give everything back, once no copy is under way."""
        _unpin_all(self._held)


def pin(memory: Tensor) -> None:
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        said = "out of memory" if error == OUT_OF_MEMORY else f"CUDA error {error}"
        raise RuntimeError(f"cannot pin {memory.nbytes} bytes of host memory: {said}")


def unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # of a lost device an error, and nothing left to do


def _unpin_all(held: dict[int, Tensor]) -> None:
    while held:
        unpin(held.popitem()[1])


def _pages(size: int) -> mmap.mmap:
    """Memory of the system for so many bytes that shares no page with other memory; in large pages where it can be."""
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot take {size} bytes of host memory: {error.strerror}") from None
    with contextlib.suppress(AttributeError, OSError):  # of a system or a kernel that has none
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
