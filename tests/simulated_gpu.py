"""Two streams of a GPU without a GPU: each runs what is queued on its own, as far as events let it.

A stream is a queue here, device memory is the CPU's, and one stream is far ahead of the other, or both far behind the
host. What is read too early, or overwritten too soon, has other numbers.
"""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlock import Store, pinned, transit
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.places import Shelf, shelf_of
from kvlock.step_file import Piece
from kvlock.store import Rows

LAYERS, SHAPE = 5, (1, 3, 2)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.index = stream, len(stream.queue)

    @property
    def over(self) -> bool:
        return self.stream.done >= self.index

    def synchronize(self) -> None:
        self.stream.advance(self.index)


class Stream:
    def __init__(self, gpu: GPU) -> None:
        self.gpu, self.device = gpu, torch.device("cuda")
        self.queue: list[Any] = []
        self.done = 0

    def add(self, work: Any) -> None:
        self.queue.append(work)
        if self.gpu.ahead is not None:
            self.gpu.ahead.advance(force=False)

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.add(event)

    def wait_stream(self, other: Stream) -> None:
        self.add(other.record_event())

    def synchronize(self) -> None:
        self.advance()

    def advance(self, end: int | None = None, *, force: bool = True) -> None:
        """Run what is queued; to go past an event of the other stream, `force` runs that one up to there."""
        while self.done < (len(self.queue) if end is None else end):
            work = self.queue[self.done]
            if isinstance(work, Event) and not work.over:
                if not force:
                    return
                work.synchronize()
            elif not isinstance(work, Event):
                work()
            self.queue[self.done] = None  # nor does a stream hold on to memory that it is done with
            self.done += 1


class GPU:
    """Two streams, in place of those of `torch.cuda`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ahead: str) -> None:
        self.ahead: Stream | None = None
        self.compute, self.copies = Stream(self), Stream(self)
        self.ahead = {"compute": self.compute, "copies": self.copies}.get(ahead)
        self.current, self.freed = self.compute, []
        self.pinned: list[weakref.ref[torch.Tensor]] = []  # by torch, which keeps it until no copy needs it
        self.registered: dict[int, torch.Tensor] = {}  # by address, until `unpin`, which waits for no copy
        self.most_pinned = 0  # bytes
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(transit, "copy", self.copy)
        monkeypatch.setattr(transit, "room_for", self.room_for)
        monkeypatch.setattr(pinned, "pin", self.pin)
        monkeypatch.setattr(pinned, "unpin", self.unpin)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.is_pinned(tensor))

    def empty(self) -> torch.Tensor:
        """Memory of the device, which the allocator gives to who computes once no name for it is left."""
        tensor = torch.full(SHAPE, torch.nan)
        weakref.finalize(tensor, self.reuse, tensor.detach()).atexit = False
        return tensor

    def reuse(self, memory: torch.Tensor) -> None:
        """Other work comes upon it, as soon as that stream goes on."""
        self.compute.queue.append(lambda: memory.fill_(torch.nan))
        self.freed.append(memory)

    @contextlib.contextmanager
    def within(self, stream: Stream):
        self.current = stream
        yield
        self.current = self.compute

    def copy(self, rows: Rows, room: Rows, *, non_blocking: bool) -> None:
        if not non_blocking:
            room.data.copy_(rows.data)
            return
        assert self.current is self.copies, "a copy that the host does not wait for holds the computation up"
        # A stream keeps memory of the host until it is done with it, and none of the device.
        source, target = (tensor if tensor.is_pinned() else tensor.detach() for tensor in (rows.data, room.data))
        self.current.add(lambda: target.copy_(source))

    def room_for(self, rows: Rows, before: Rows | None, device: torch.device, *, pinned: bool = False) -> Rows:
        if before is not None:
            return before
        if not pinned:
            return Rows(self.empty())
        room = Rows(torch.full(SHAPE, torch.nan))
        self.pinned.append(weakref.ref(room.data))
        self.most_pinned = max(self.most_pinned, self.pinned_bytes)
        return room

    def pin(self, memory: torch.Tensor) -> None:
        self.registered[memory.data_ptr()] = memory
        self.most_pinned = max(self.most_pinned, self.pinned_bytes)

    def unpin(self, memory: torch.Tensor) -> None:
        assert self.copies.done == len(self.copies.queue), "memory is given back while copies may need it"
        self.registered.pop(memory.data_ptr()).view(torch.float32).fill_(torch.nan)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self.registered or any(room() is tensor for room in self.pinned)

    @property
    def pinned_bytes(self) -> int:
        by_torch = [room.nbytes for reference in self.pinned if (room := reference()) is not None]
        return sum(by_torch) + sum(memory.nbytes for memory in self.registered.values())

    def finish(self) -> None:
        self.compute.advance()
        self.copies.advance()


def served(place: str, tmp_path: Path) -> tuple[Shelf, list[Piece]]:
    """A shelf of that place, and what is put there."""
    shelf = shelf_of(Store(place=place, folder=tmp_path if place == "disk" else None))
    assert shelf is not None
    shelf.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    return shelf, [Piece(0, "blocks", i, tensor) for i in range(LAYERS) for tensor in "kv"]


def put(gpu: GPU, shelf: Shelf, number: dict[Piece, float]) -> None:
    """A source's forward: each piece is computed, given its number, handed over and left."""
    for piece in number:
        rows = gpu.empty()
        gpu.compute.add(partial(rows.detach().fill_, number[piece]))
        shelf.put(piece, Rows(rows), BEFORE_ROPE)
        del rows
        gpu.compute.add(lambda: None)
    shelf.seal()
