"""Where the source rows of a step wait for the edit when they leave the device: host memory, or a file."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlock.step_file import Piece, StepFile, StepWriter
from kvlock.store import Rows, Store

Layer = tuple[int, str, int]  # a `Piece` but for its tensor


class Courier:
    """Brings the rows of a layer to the device, on a stream of its own, while the layer before it computes.

    Layers are asked for in a fixed order, over and over: once for each guidance branch. `LAYERS_ON_DEVICE` of them are
    on the device at a time, the one that computes and the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._here: dict[Layer, tuple[dict[Piece, Rows], Any]] = {}  # with the event of their arrival

    def fetch(self, piece: Piece, order: Sequence[Layer], load: Callable[[Layer], dict[Piece, Rows]]) -> Rows:
        """The rows of `piece` on the device, in time for what the caller queues next; the next layer's set off."""
        now = piece.layer
        following = order[(order.index(now) + 1) % len(order)]
        for layer in [layer for layer in self._here if layer not in (now, following)]:
            del self._here[layer]
        for layer in (now, following):
            if layer not in self._here:
                self._here[layer] = self._send(load(layer))
        rows, arrival = self._here[now]
        if arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival)
        return rows[piece]

    def forget(self) -> None:
        self._here.clear()

    @property
    def bytes_here(self) -> int:
        return sum(kept.bytes_kept for rows, _ in self._here.values() for kept in rows.values())

    def _send(self, rows: dict[Piece, Rows]) -> tuple[dict[Piece, Rows], Any]:
        if self.stream is None:
            return {piece: _moved(kept, self._device) for piece, kept in rows.items()}, None
        user = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            moved = {piece: _moved(kept, self._device) for piece, kept in rows.items()}
            arrival = self.stream.record_event()
        for part in (part for kept in moved.values() for part in kept if part is not None):
            part.record_stream(user)  # its memory is not given away before this stream is done with it
        return moved, arrival


def _moved(rows: Rows, device: torch.device) -> Rows:
    return rows.each(lambda part: part.to(device, non_blocking=True, copy=True))


class Shelf(ABC):
    """Source rows of one step, put by the source's forward layer by layer and got by the edit's forwards."""

    def __init__(self) -> None:
        self._courier: Courier | None = None
        self._order: list[Layer] = []  # in which layers are used

    def serve(self, device: torch.device, layers: Collection[Layer]) -> None:
        """Where `get` has to bring rows, and those of which layers are asked for."""
        self._courier = Courier(device)

    def get(self, piece: Piece) -> Rows:
        """Rows on the device, for work on its current stream.

        Raises:
            ValueError: none are kept for this layer.
        """
        if piece.layer not in self._order:
            raise ValueError(f"{piece.stack}[{piece.block}] has no source rows for {piece.tensor}; record them first")
        assert self._courier is not None
        return self._courier.fetch(piece, self._order, self._load)

    def put(self, piece: Piece, rows: Rows) -> None:
        """Keep rows that the current stream has been told to compute."""
        if piece.layer not in self._order:
            self._order.append(piece.layer)
        self._put(piece, rows)

    def turn_to(self, step: int) -> None:
        """Begin with step number `step` of the scheduler's table."""
        self.clear()

    def seal(self) -> None:  # noqa: B027 - a file is finished here, memory needs nothing
        """Every layer has put its rows."""

    def clear(self) -> None:
        """Forget the step's rows."""
        self._order.clear()
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
    def _load(self, layer: Layer) -> dict[Piece, Rows]:
        """What is kept of one layer, in host memory; pinned where a CUDA device copies from it on its own."""


class HostShelf(Shelf):
    """Rows in host memory, pinned where the device is a CUDA one; the memory of one step serves the next."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Piece, Rows] = {}

    def _put(self, piece: Piece, rows: Rows) -> None:
        if any(kept.expert != piece.expert for kept in self._kept):
            self._kept.clear()
        before = self._kept.get(piece)
        rooms = before if before is not None and _fits(before, rows) else rows.each(_room)
        self._kept[piece] = rooms
        stream = self._courier.stream if self._courier is not None else None
        if stream is None:
            for room, part in _pairs(rooms, rows):
                room.copy_(part)
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # after what it still reads of the last step
            for room, part in _pairs(rooms, rows):
                room.copy_(part, non_blocking=True)
                part.record_stream(stream)

    def _load(self, layer: Layer) -> dict[Piece, Rows]:
        return {piece: rows for piece, rows in self._kept.items() if piece.layer == layer}

    def close(self) -> None:
        super().close()
        self._kept.clear()

    @property
    def bytes_kept(self) -> int:
        return sum(rows.bytes_kept for piece, rows in self._kept.items() if piece.layer in self._order)


def _fits(before: Rows, rows: Rows) -> bool:
    """Whether one can be copied over the other."""
    kinds = [[part if part is None else (part.shape, part.dtype) for part in parts] for parts in (before, rows)]
    return kinds[0] == kinds[1]


def _room(part: Tensor) -> Tensor:
    """Host memory for a copy of `part`."""
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)


def _pairs(rooms: Rows, rows: Rows) -> list[tuple[Tensor, Tensor]]:
    return [(room, part) for room, part in zip(rooms, rows, strict=True) if room is not None and part is not None]


class FileShelf(Shelf):
    """Rows in a file of the step."""

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
        self._file, self._order = file, list(dict.fromkeys(piece.layer for piece in pieces))
        self._bytes = sum(file.rows(piece).bytes_kept for piece in pieces)

    def _load(self, layer: Layer) -> dict[Piece, Rows]:
        assert self._file is not None and self._courier is not None
        found = {piece: self._file.rows(piece) for piece in self._file.pieces if piece.layer == layer}
        if self._courier.stream is None:
            return found
        return {piece: rows.each(Tensor.pin_memory) for piece, rows in found.items()}


class DiskShelf(FileShelf):
    """A file that lasts one step, in a temporary folder that lasts as long as the session.

    Raises:
        ValueError: there is no such folder, or it cannot be written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=".kvlock-", dir=folder))
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise ValueError(f"cannot write source rows to {where}: {error.strerror}") from error
        self._writer: StepWriter | None = None
        self._path = self._folder / "step.safetensors"

    def _put(self, piece: Piece, rows: Rows) -> None:
        if self._writer is None:
            self._writer = StepWriter(self._path)
        self._writer.add(piece, rows)
        self._bytes += rows.bytes_kept

    def seal(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._open(StepFile(self._path))

    def clear(self) -> None:
        super().clear()
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


def shelf_of(store: Store) -> Shelf | None:
    """Where a store keeps its rows; None is with the layers, on the device."""
    if store.place == "device":
        return None
    return HostShelf() if store.place == "host" else DiskShelf(store.folder)
