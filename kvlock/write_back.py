"""When a system writes to the disk what programs wrote to files, where that depends on them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from pathlib import Path

VMSTAT = Path("/proc/vmstat")
WRITE = 2  # SYNC_FILE_RANGE_WRITE


def begin(file: int, start: int, size: int) -> None:
    """Begin to write `size` bytes of an open file to the disk, from byte `start`, and do not wait until they are there.

    It only moves forward what the system does anyway, and where that cannot be asked for (`sync_file_range` of Linux),
    nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function, and on Windows no such library
        ctypes.CDLL(None).sync_file_range(file, ctypes.c_int64(start), ctypes.c_int64(size), WRITE)


def background_bytes() -> float:
    """How many bytes of files may wait for the disk before the system begins to write; infinite where it does not say.

    Linux counts those of all programs: `vm.dirty_background_ratio` percent of the memory that files could have.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in VMSTAT.read_text(encoding="ascii").splitlines():
            name, pages = line.split()
            if name == "nr_dirty_background_threshold":
                return int(pages) * mmap.PAGESIZE
    return math.inf
