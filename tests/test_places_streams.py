"""The order in which two streams of a GPU may run what places queue: each on its own, as far as events let it.

A stream is a queue here, device memory is the CPU's, and one stream is far ahead of the other, or both far behind the
host. What is read too early, or overwritten too soon, has other numbers.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch

from kvlock import KVLockConfig, Store, places
from kvlock.cost import ModelSizes, estimate
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.places import Courier, shelf_of
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
        self.current, self.pinned, self.freed, self.rooms = self.compute, set(), [], []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(places, "_copy", self.copy)
        monkeypatch.setattr(places, "_room_for", self.room_for)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in self.pinned)
        forget = Courier.forget

        def freeing(courier: Courier) -> None:
            parts = [slot.rows[name].data for slot in courier._slots for name in slot.rows]
            forget(courier)
            for part in parts:  # the allocator gives them to who computes
                self.compute.add(lambda part=part: part.fill_(torch.nan))
            self.freed += parts

        monkeypatch.setattr(Courier, "forget", freeing)

    @contextlib.contextmanager
    def within(self, stream: Stream):
        self.current = stream
        yield
        self.current = self.compute

    def copy(self, rows: Rows, room: Rows, *, non_blocking: bool) -> None:
        if non_blocking:
            self.current.add(lambda: room.data.copy_(rows.data))
        else:
            room.data.copy_(rows.data)

    def room_for(self, rows: Rows, before: Rows | None, device: torch.device, *, pinned: bool = False) -> Rows:
        if before is not None:
            return before
        room = Rows(torch.full(SHAPE, torch.nan))
        if pinned:
            self.pinned.add(room.data.data_ptr())
            self.rooms.append(weakref.ref(room.data))
        return room

    @property
    def pinned_bytes(self) -> int:
        return sum(room.nbytes for reference in self.rooms if (room := reference()) is not None)

    def finish(self) -> None:
        self.compute.advance()
        self.copies.advance()


@pytest.mark.parametrize("ahead", ["compute", "copies", "the host"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_rows_arrive_before_they_are_read_and_stay_until_they_were(monkeypatch, tmp_path, place, ahead):
    gpu = GPU(monkeypatch, ahead)
    shelf = shelf_of(Store(place=place, folder=tmp_path if place == "disk" else None))
    shelf.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    pieces = [Piece(0, "blocks", i, tensor) for i in range(LAYERS) for tensor in "kv"]
    read, pinned = [], []

    def check(rows: Rows, number: float) -> None:
        read.append(number)
        assert torch.equal(rows.data, torch.full(SHAPE, number)), f"found {rows.data.unique()}, wanted {number}"

    for step in range(3):
        number = {piece: 100.0 * step + 2 * piece.block + (piece.tensor == "v") for piece in pieces}
        shelf.turn_to(step)
        for piece in pieces:
            rows = torch.full(SHAPE, torch.nan)
            gpu.compute.add(lambda rows=rows, piece=piece: rows.fill_(number[piece]))  # noqa: B023 - run in this step
            if place == "disk":
                gpu.compute.advance()  # to write a tensor to a file is to wait for it
            shelf.put(piece, Rows(rows), BEFORE_ROPE)
            gpu.compute.add(lambda: None)
        shelf.seal()
        for _ in range(2):
            for piece in pieces:
                rows = shelf.get(piece)
                gpu.compute.add(lambda rows=rows, wanted=number[piece]: check(rows, wanted))
                pinned.append(gpu.pinned_bytes)
    shelf.close()
    gpu.finish()
    assert len(read) == 3 * 2 * len(pieces)
    assert all(part.isnan().all() for part in gpu.freed)
    _, tokens, values = SHAPE
    sizes = ModelSizes(layers=LAYERS, heads=1, head_dim=values, token_values=1)
    rows = {"tokens": tokens, "background_rows": tokens, "bytes_per_value": 4}
    assert max(pinned) == estimate(sizes, KVLockConfig(), **rows, store=Store(place=place)).bytes_host
