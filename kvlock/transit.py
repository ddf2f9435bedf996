"""Rows on their way: from files or the host to the device while it computes, and from the device into files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from kvlock.step_file import Piece, StepWriter
from kvlock.store import LAYERS_ON_DEVICE, Rows

LEAVING = 2 * LAYERS_ON_DEVICE  # pieces that may be on their way from the device to memory: K and V of so many layers
Layer = tuple[int, str, int]  # a `Piece` but for its tensor


class _Slot(NamedTuple):
    """Room for the rows of one layer on the device."""

    layer: Layer
    rows: dict[str, Rows]  # by "k" and "v"
    stage: dict[str, Rows]  # pinned host memory on the way of rows that are not pinned themselves
    arrival: Any  # event of the copy stream


class Courier:
    """Brings the rows of a layer to the device, on a stream of its own, while the layer before it computes.

    Layers are asked for in a fixed order, over and over: once for each guidance branch. `LAYERS_ON_DEVICE` of them have
    room there, the one that computes and the next; a copy into the room of another layer waits until the device is done
    with that one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots: list[_Slot] = []

    def fetch(self, piece: Piece, order: Sequence[Layer], load: Callable[[Layer], dict[str, Rows]]) -> Rows:
        """The rows of `piece` on the device, in time for what the caller queues next; the next layer's set off."""
        now = piece.layer
        following = order[(order.index(now) + 1) % len(order)]
        for layer, kept in ((now, following), (following, now)):
            if all(slot.layer != layer for slot in self._slots):
                self._send(layer, load(layer), kept)
        slot = next(slot for slot in self._slots if slot.layer == now)
        if slot.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrival)
        return slot.rows[piece.tensor]

    def forget(self) -> None:
        """Give the room back; work that the current stream has queued may still use it."""
        if self.stream is not None and self._slots:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._slots.clear()

    def _send(self, layer: Layer, source: dict[str, Rows], kept: Layer) -> None:
        """Copy rows into the room of the layer that is not to be kept, or into new room while there are few."""
        taken = _Slot(layer, {}, {}, None)
        if len(self._slots) == LAYERS_ON_DEVICE:
            taken = next(slot for slot in self._slots if slot.layer != kept)
            self._slots.remove(taken)
        rows = {name: room_for(part, taken.rows.get(name), self.device) for name, part in source.items()}
        if self.stream is None:
            with record_function("kvlock::read_rows"):
                for name, part in source.items():
                    copy(part, rows[name], non_blocking=False)
            self._slots.append(_Slot(layer, rows, {}, None))
            return
        stage = taken.stage
        for name, part in source.items():
            if not part.data.is_pinned():
                if taken.arrival is not None:
                    wait_for(taken.arrival)  # the last copy out of this stage
                stage[name] = room_for(part, stage.get(name), torch.device("cpu"), pinned=True)
                with record_function("kvlock::read_rows"):
                    copy(part, stage[name], non_blocking=False)
                source = source | {name: stage[name]}
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            for name, part in source.items():
                copy(part, rows[name], non_blocking=True)
            self._slots.append(_Slot(layer, rows, stage, self.stream.record_event()))


def room_for(rows: Rows, before: Rows | None, device: torch.device, *, pinned: bool = False) -> Rows:
    """Memory for a copy of `rows`: that of `before`, where it fits."""
    if before is not None and fits(rows, before):
        return before
    return rows.each(lambda part: torch.empty(part.shape, dtype=part.dtype, device=device, pin_memory=pinned))


def fits(rows: Rows, room: Rows) -> bool:
    """Whether `room` is memory for a copy of `rows`."""
    kinds = [[part if part is None else (part.shape, part.dtype) for part in parts] for parts in (room, rows)]
    # torch lets nothing write to tensors of an inference mode that is over
    return kinds[0] == kinds[1] and (torch.is_inference_mode_enabled() or not room.data.is_inference())


def wait_for(copied: Any) -> None:
    """Until the copy of this event is over."""
    with record_function("kvlock::wait_for_copy"):
        copied.synchronize()


def copy(rows: Rows, room: Rows, *, non_blocking: bool) -> None:
    for part, to in zip(rows, room, strict=True):
        if part is not None and to is not None:
            to.copy_(part, non_blocking=non_blocking)


class _Leaving(NamedTuple):
    """Rows whose copy off the device may be under way."""

    copied: Any  # event of the copy stream
    writer: StepWriter
    piece: Piece
    rows: Rows  # on the device
    room: Rows  # pinned


class Outbox:
    """Rows on their way from the device into files, by way of pinned memory: written once their copy is over.

    Threads write, one at a time to each file: the host goes on to queue work for the device, and what has files of its
    own is written at the same time. One thread, at 5 GB/s, does not keep up with a GPU that computes a layer of 157 MB
    in 20 ms, and two have a quarter of the time to spare: a store on disk has four, a recording one. The host is held
    back where the rows of more than one layer would be leaving.
    """

    def __init__(self) -> None:
        self._leaving: deque[_Leaving] = deque()
        self._writing: dict[StepWriter, tuple[Future[None], Piece, Rows]] = {}  # what threads have
        self._free: dict[str, deque[Rows]] = {"k": deque(), "v": deque()}  # packed, only keys may have a mean
        self._threads: ThreadPoolExecutor | None = None

    def add(self, writer: StepWriter, piece: Piece, rows: Rows, stream: Any) -> None:
        """Write rows, those of one file in the order in which they come.

        With a stream they go to pinned memory on it, and to the file once that copy is over, while the device computes
        on; without one at once.

        Raises:
            ValueError: rows cannot be written, these or earlier ones.
        """
        if stream is None:
            with record_function("kvlock::write_rows"):
                writer.add(piece, rows)
            return
        if len(self._leaving) == 2:  # K and V of a layer; what is being written has left the device
            self._write_first()
        free = self._free[piece.tensor]
        before = free.popleft() if free else None
        room = room_for(rows, before, torch.device("cpu"), pinned=True)
        stream.wait_event(torch.cuda.current_stream(stream.device).record_event())
        with torch.cuda.stream(stream):
            copy(rows, room, non_blocking=True)
            self._leaving.append(_Leaving(stream.record_event(), writer, piece, rows, room))

    def finish(self) -> None:
        """Write what is left, and give memory and threads back; raises as `add`."""
        while self._leaving:
            self._write_first()
        for writer in [*self._writing]:
            self._wait_for(writer)
        self.discard()

    def discard(self) -> None:
        """Forget what is left, once no copy and no thread needs its memory."""
        try:
            for leaving in self._leaving:
                wait_for(leaving.copied)
        finally:
            self._leaving.clear()
            if self._threads is not None:
                self._threads.shutdown()  # waits for what is being written
                self._threads = None
            self._writing.clear()
            for free in self._free.values():
                free.clear()

    def _write_first(self) -> None:
        first = self._leaving[0]
        wait_for(first.copied)  # till then the rows are held, so that nothing else gets their memory
        writer, piece, room = first.writer, first.piece, first.room
        del first
        self._leaving.popleft()
        self._wait_for(writer)
        self._threads = self._threads or ThreadPoolExecutor(thread_name_prefix="kvlock")
        self._writing[writer] = self._threads.submit(writer.add, piece, room), piece, room

    def _wait_for(self, writer: StepWriter) -> None:
        """Until it can take the next piece."""
        if writer not in self._writing:
            return
        written, piece, room = self._writing.pop(writer)
        try:
            with record_function("kvlock::wait_for_write"):
                written.result()
        finally:
            del written  # an error has this frame, which would have the error: all that is in it would stay
        self._free[piece.tensor].append(room)
