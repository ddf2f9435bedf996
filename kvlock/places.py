"""Where the source rows of a step wait for the edit when they leave the device: host memory, or files."""

from __future__ import annotations

import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from kvlock import transit, write_back
from kvlock.pinned import PinnedMemory
from kvlock.step_file import Piece, StepFile, StepWriter
from kvlock.store import LAYERS_AT_ONCE, Rows, Store
from kvlock.transit import Courier, Layer, Outbox

LEFT_TO_WAIT = 0.5  # of the bytes of files that may wait for the disk; other programs have some too


class Shelf(ABC):
    """Source rows of one step, put by the source's forward layer by layer and got by the edit's forwards.

    Attributes:
        points: where in their attention the rows were taken that have been put.
    """

    def __init__(self) -> None:
        self.points: dict[Piece, str] = {}
        self._courier: Courier | None = None
        self._order: list[Layer] = []  # in which layers are used

    def serve(self, device: torch.device, layers: Collection[Layer]) -> None:
        """Where `get` has to bring rows, and those of which layers are asked for."""
        if self._courier is None or self._courier.device != device:
            self._courier = Courier(device)

    @property
    def _copy_stream(self) -> Any:
        """The stream of copies, where the device is a CUDA one."""
        return self._courier.stream if self._courier is not None else None

    def get(self, piece: Piece) -> Rows:
        """Rows on the device, for work on its current stream.

        Raises:
            ValueError: none are kept for this layer.
        """
        if piece.layer not in self._order:
            raise ValueError(f"{piece.stack}[{piece.block}] has no source rows for {piece.tensor}; record them first")
        assert self._courier is not None
        return self._courier.fetch(piece, self._order, self._load)

    def put(self, piece: Piece, rows: Rows, point: str) -> None:
        """Keep rows, taken at `point`, that the current stream has been told to compute."""
        if piece.layer not in self._order:
            self._order.append(piece.layer)
        self.points[piece] = point
        self._put(piece, rows)

    def turn_to(self, step: int) -> None:
        """Begin with step number `step` of the scheduler's table."""
        self.clear()

    def seal(self) -> None:  # noqa: B027 - a file is finished here, memory needs nothing
        """Every layer has put its rows."""

    def clear(self) -> None:
        """Forget the step's rows."""
        self._order.clear()
        self.points.clear()
        if self._courier is not None:
            self._courier.forget()

    def close(self) -> None:
        """The session ends."""
        self.clear()

    @property
    @abstractmethod
    def bytes_kept(self) -> int:
        """Bytes of the step's rows."""

    @abstractmethod
    def _put(self, piece: Piece, rows: Rows) -> None: ...

    @abstractmethod
    def _load(self, layer: Layer) -> dict[str, Rows]:
        """What is kept of one layer, "k" and "v", in host memory."""


class HostShelf(Shelf):
    """Rows in host memory, pinned where the device is a CUDA one; the memory of one step serves the next."""

    def __init__(self) -> None:
        super().__init__()
        # By a `Piece` but for its expert, of whom one runs a step.
        self._rooms: dict[tuple[str, int, str], tuple[Rows, PinnedMemory]] = {}
        self._leaving: deque[tuple[Any, Rows]] = deque()  # rows on the device with the events of their copies

    def serve(self, device: torch.device, layers: Collection[Layer]) -> None:
        if self._courier is not None and self._courier.device != device:
            self.close()  # memory may be pinned for a device that is left, or not for the one that comes
        super().serve(device, layers)

    def _put(self, piece: Piece, rows: Rows) -> None:
        stream = self._copy_stream
        if stream is None:
            with record_function("kvlock::write_rows"):
                transit.copy(rows, self._room_for(piece, rows), non_blocking=False)
            return
        stream.wait_event(torch.cuda.current_stream(stream.device).record_event())
        with torch.cuda.stream(stream):  # after what it still reads of the last step
            transit.copy(rows, self._room_for(piece, rows), non_blocking=True)
            self._leaving.append((stream.record_event(), rows))
        self._wait_for_all_but(transit.LEAVING)  # the host may run ahead, and rows of all layers be alive

    def _room_for(self, piece: Piece, rows: Rows) -> Rows:
        """Memory for these rows: that of the step before, where it fits, or new one for the device that is current."""
        name = piece[1:]
        if name in self._rooms:
            room, memory = self._rooms[name]
            if transit.fits(rows, room):
                return room
            del self._rooms[name]
            self._wait_for_copies()
            memory.free()
        memory, pinned = PinnedMemory(), self._copy_stream is not None
        room = rows.each(memory.empty_like) if pinned else transit.room_for(rows, None, torch.device("cpu"))
        self._rooms[name] = room, memory
        return room

    def _wait_for_copies(self) -> None:
        """Until none is under way, from here to the device or back."""
        if self._copy_stream is not None:
            self._copy_stream.synchronize()

    def _wait_for_all_but(self, last: int) -> None:
        while len(self._leaving) > last:
            transit.wait_for(self._leaving[0][0])  # the rows are held meanwhile
            self._leaving.popleft()

    def seal(self) -> None:
        self._wait_for_all_but(0)

    def clear(self) -> None:
        self.seal()
        super().clear()

    def _load(self, layer: Layer) -> dict[str, Rows]:
        return {piece.tensor: self._rooms[piece[1:]][0] for piece in self.points if piece.layer == layer}

    def close(self) -> None:
        with ExitStack() as last_first:  # also where the device is lost and waiting for it raises
            for _, memory in self._rooms.values():
                last_first.callback(memory.free)
            last_first.callback(self._rooms.clear)
            last_first.callback(self._leaving.clear)
            last_first.callback(self._wait_for_copies)
            last_first.callback(super().close)

    @property
    def bytes_kept(self) -> int:
        return sum(self._rooms[piece[1:]][0].bytes_kept for piece in self.points)


class FileShelf(Shelf):
    """Rows in files of the step."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: Collection[Layer] = ()
        self._file: StepFile | None = None
        self._bytes = 0

    def serve(self, device: torch.device, layers: Collection[Layer]) -> None:
        super().serve(device, layers)
        self._layers = layers

    def clear(self) -> None:
        super().clear()
        self._file, self._bytes = None, 0

    @property
    def bytes_kept(self) -> int:
        return self._bytes

    def _open(self, file: StepFile) -> None:
        """From here on its rows are got, of the layers that are asked for."""
        pieces = [piece for piece in file.pieces if piece.layer in self._layers]
        # A recording has the order in its file; where layers take turns in several, it is that in which they were put.
        self._file, self._order = file, self._order or list(dict.fromkeys(piece.layer for piece in pieces))
        self._bytes = sum(file.rows(piece).bytes_kept for piece in pieces)

    def _load(self, layer: Layer) -> dict[str, Rows]:
        assert self._file is not None
        return {piece.tensor: self._file.rows(piece) for piece in self._file.pieces if piece.layer == layer}


class DiskShelf(FileShelf):
    """Files of K and of V that each step writes over, in a temporary folder that lasts as long as the session.

    Layers take turns in `LAYERS_AT_ONCE` files of each, because systems let one thread at a time write to a file. The
    files of a whole step last until `close`: a system takes long to remove so many bytes, and no step waits for that.

    When more bytes wait for the disk than a system allows, it writes out files from one end to the other, also layers
    that are about to be written over, and holds writers up where it falls behind. So where a step has so many, or is
    the first one, the first layers are left to wait, and each that comes after them is begun to be written at once.

    Raises:
        ValueError: there is no such folder, or it cannot be written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=".kvlock-", dir=folder)).absolute()
        except (OSError, ValueError) as error:  # a path with a null byte is no OSError
            where, why = folder or tempfile.gettempdir(), getattr(error, "strerror", None) or error
            raise ValueError(f"cannot write source rows to {where}: {why}") from error
        self._writers: dict[str, StepWriter] = {}  # by the name of the file
        self._step_bytes: float = math.inf  # of the last step; the first one may have any number
        self._outbox = Outbox()

    def _put(self, piece: Piece, rows: Rows) -> None:
        name = f"{piece.tensor}{self._order.index(piece.layer) % LAYERS_AT_ONCE}.safetensors"
        if name not in self._writers:
            self._writers[name] = StepWriter(self._folder / name, over=True, early_from=self._left_to_wait())
        self._outbox.add(self._writers[name], piece, rows, self._copy_stream)

    def _left_to_wait(self) -> float:
        """Bytes of each file that the system may write to the disk when it wants."""
        allowed, files = write_back.background_bytes(), 2 * LAYERS_AT_ONCE
        return LEFT_TO_WAIT * allowed / files if self._step_bytes > allowed else math.inf

    def seal(self) -> None:
        if self._writers:
            self._outbox.finish()
            for writer in self._writers.values():
                writer.close()
            written = [writer.path for writer in self._writers.values()]
            self._writers.clear()
            self._open(StepFile(*written))
            self._step_bytes = self.bytes_kept

    def clear(self) -> None:
        """Forget the step's rows and remove files that are half written, also where the device is lost."""
        with ExitStack() as last_first:
            last_first.callback(self._writers.clear)
            for writer in self._writers.values():
                last_first.callback(writer.discard)
            last_first.callback(self._outbox.discard)
            last_first.callback(super().clear)

    def close(self) -> None:
        try:
            super().close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def shelf_of(store: Store) -> Shelf | None:
    """Where a store keeps its rows; None is with the layers, on the device."""
    if store.place == "device":
        return None
    return HostShelf() if store.place == "host" else DiskShelf(store.folder)
