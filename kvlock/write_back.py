"""Begins to write parts of files to the disk, and says how much may wait for it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from pathlib import Path

VMSTAT = Path("/proc/vmstat")
WRITE = 2  # SYNC_FILE_RANGE_WRITE


def begin(descriptor: int, start: int, size: int) -> None:
    """Begin to write `size` bytes of an open file to the disk, from byte `start`.

    This waits for room in the disk's queue and not until they are there. It is a hint: where Linux's `sync_file_range`
    is not there or cannot be followed, nothing happens. On overlayfs, the root of most containers, it has no effect,
    because there a file has its pages elsewhere.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function, and on Windows no such library
        ctypes.CDLL(None).sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), WRITE)


def background_bytes() -> float:
    """How many bytes of files may wait for the disk before the system begins to write; infinite where it does not say.

    Linux counts those of all programs: `vm.dirty_background_ratio` percent (10 by default) of the memory that files
    could have. Halfway from there to `vm.dirty_ratio` (20) it begins to slow down who writes. A container's own limit
    is not in it.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in VMSTAT.read_text(encoding="ascii").splitlines():
            name, pages = line.split()
            if name == "nr_dirty_background_threshold":
                return float(pages) * mmap.PAGESIZE
    return math.inf
