"""Host memory that a CUDA device copies from and to by itself, pinned in the sizes that are asked for."""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor
from torch.profiler import record_function

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class PinnedMemory:
    """Pinned memory for some tensors, until `free`; without that it goes with this object, and nothing is waited for.

    Torch's own allocator takes a power of two of bytes and does not give it back to the system by itself. One thread
    finds the pages: on a machine with an H200 that took 49 ms for a tensor of 70 MiB, where the next one comes after
    10 ms. This took 7 ms.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []  # of bytes
        weakref.finalize(self, _unpin_all, self._held).atexit = False  # then the system takes it

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory for a copy of `tensor`, whatever its device: a contiguous tensor of its shape and dtype.

        Raises:
            MemoryError: the host has not so much.
            RuntimeError: the device cannot use so much of it.
        """
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        # A later call may be outside of an inference mode, and has to write to it.
        with torch.inference_mode(False), record_function("kvlock::pin_memory"):
            memory = torch.frombuffer(_pages(tensor.nbytes), dtype=torch.uint8)
            memory.zero_()  # by all threads: a page is found when it is first touched
            pin(memory)
            self._held.append(memory)
            return memory.view(tensor.dtype).view(tensor.shape)

    def free(self) -> None:
        """Give it back; whoever calls has waited for its copies."""
        _unpin_all(self._held)


def pin(memory: Tensor) -> None:
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error:
        forget_error()
        said = "out of memory" if error == OUT_OF_MEMORY else f"CUDA error {error}"
        raise RuntimeError(f"cannot pin {memory.nbytes} bytes of host memory: {said}")


def unpin(memory: Tensor) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())):  # of a lost device, and nothing is left to do
        forget_error()


def forget_error() -> None:
    """CUDA keeps an error of a thread until somebody asks, and torch asks after launches: the next one would raise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unpin_all(held: list[Tensor]) -> None:
    while held:
        unpin(held.pop())


def _pages(size: int) -> mmap.mmap:
    """Memory of the system for so many bytes that shares no page with other memory; in large pages where it can be."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
    try:
        pages = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"cannot take {size} bytes of host memory: {error.strerror}") from None
    with contextlib.suppress(AttributeError, OSError):  # a system that has no large pages, or a kernel built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
