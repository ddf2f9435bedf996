"""The checksums of a recording's step files: compared by one session, in the background, before it needs them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from kvlock.manifest import short
from kvlock.step_file import digest

State = tuple[int, int, int]  # size, time and number of a file: another state may have another content


class Verifier:
    """Compares files with what was recorded of them; what is right is noted for others, until the file changes.

    A session has one of its own: its threads and their end are no one else's.
    """

    def __init__(
        self, path: Path, folder: Path, recorded: dict[str, dict[str, Any]], verified: MutableMapping[str, State]
    ) -> None:
        self._path, self._folder, self._recorded, self._verified = path, folder, recorded, verified
        self._pending: dict[str, tuple[State, Future[None]]] = {}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="kvlock-checksum")

    def begin(self, names: Iterable[str]) -> None:
        """Set off, in this order."""
        for name in names:
            self._check(name)

    def require(self, name: str) -> None:
        """Wait for one file.

        Raises:
            ValueError: it cannot be read, or is not what was recorded.
        """
        check = self._check(name)
        if check is not None:
            with record_function("kvlock::wait_for_checksum"):
                check.result()

    def stop(self) -> None:
        """Leave the files that are not through."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _check(self, name: str) -> Future[None] | None:
        """Of the file as it is now; None where it has been found right since it last changed."""
        state = state_of(self._folder / name, self._path / name)
        if self._verified.get(name) == state:
            return None
        if self._pending.get(name, (None, None))[0] != state:
            self._pending[name] = state, self._pool.submit(self._compare, name, state)
        return self._pending[name][1]

    def _compare(self, name: str, state: State) -> None:
        compare(self._folder / name, self._path / name, self._recorded, self._stopped)
        if not self._stopped.is_set():
            self._verified[name] = state


def state_of(file: Path, shown: Path) -> State:
    """What the system says of a file, which messages call `shown`; raises ValueError where it says nothing."""
    try:
        found = file.stat()
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


def compare(
    file: Path, shown: Path, recorded: dict[str, dict[str, Any]], stopped: threading.Event | None = None
) -> None:
    """Wants the checksum that was recorded of a file; nothing is compared where `stopped` is set meanwhile.

    Raises:
        ValueError: it has another one, cannot be read or was not recorded.
    """
    entry = recorded.get(file.name)
    if entry is None:
        raise ValueError(f"{shown} is not among the files that were recorded")
    try:
        found = digest(file, stopped)
    except OSError as error:
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from error
    if found != entry["sha256"] and not (stopped is not None and stopped.is_set()):
        raise ValueError(f"{shown} has checksum {found[:12]}; wanted {short(entry['sha256'])}, as recorded")
