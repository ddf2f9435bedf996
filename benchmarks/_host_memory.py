"""How far the memory of this process rises above where it stood."""

import contextlib
import ctypes
from pathlib import Path

PROC = Path("/proc/self")


class HostMemory:
    """Counts anew from where it is made; what others have left behind is not counted, nor room for reuse."""

    def __init__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that its use is seen again
        self._before = 0
        with contextlib.suppress(OSError):
            (PROC / "clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
            self._before = _highest()

    @property
    def peak(self) -> int:
        """Bytes, or 0 where the system does not say."""
        return _highest() - self._before if self._before else 0


def _highest() -> int:
    """The highest so far, in bytes."""
    lines = (PROC / "status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
