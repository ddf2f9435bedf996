"""The order in which two streams of a GPU may run what places queue: each on its own, as far as events let it.

A stream is a queue here, device memory is the CPU's, and one stream is far ahead of the other, or both far behind the
host. What is read too early, or overwritten too soon, has other numbers.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlock import KVLockConfig, Store, transit
from kvlock.cost import ModelSizes, estimate
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.manifest import step_name
from kvlock.places import Shelf, shelf_of
from kvlock.recorder import Recorder
from kvlock.step_file import Piece, StepFile, StepWriter
from kvlock.store import LAYERS_ON_DEVICE, Rows

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
        self.current, self.freed, self.pinned = self.compute, [], []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(transit, "copy", self.copy)
        monkeypatch.setattr(transit, "room_for", self.room_for)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: any(room() is tensor for room in self.pinned))

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
        return room

    @property
    def pinned_bytes(self) -> int:
        return sum(room.nbytes for reference in self.pinned if (room := reference()) is not None)

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


@pytest.mark.parametrize("ahead", ["compute", "copies", "the host"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_rows_arrive_before_they_are_read_and_stay_until_they_were(monkeypatch, tmp_path, place, ahead):
    gpu = GPU(monkeypatch, ahead)
    shelf, pieces = served(place, tmp_path)
    read, pinned = [], []

    def check(memory: torch.Tensor, number: float) -> None:
        read.append(number)
        assert torch.equal(memory, torch.full(SHAPE, number)), f"found {memory.unique()}, wanted {number}"

    for step in range(3):
        number = {piece: 100.0 * step + 2 * piece.block + (piece.tensor == "v") for piece in pieces}
        shelf.turn_to(step)
        put(gpu, shelf, number)
        for _ in range(2):
            for piece in pieces:
                memory = shelf.get(piece).data.detach()
                gpu.compute.add(lambda memory=memory, wanted=number[piece]: check(memory, wanted))
                pinned.append(gpu.pinned_bytes)
    shelf.close()
    gpu.finish()
    assert len(read) == 3 * 2 * len(pieces)
    assert len(gpu.freed) == 3 * (len(pieces) + 2 * LAYERS_ON_DEVICE)  # what was put, and the room of each step
    assert all(memory.isnan().all() for memory in gpu.freed)
    _, tokens, values = SHAPE
    sizes = ModelSizes(layers=LAYERS, heads=1, head_dim=values, token_values=1)
    rows = {"tokens": tokens, "background_rows": tokens, "bytes_per_value": 4}
    assert max(pinned) == estimate(sizes, KVLockConfig(), **rows, store=Store(place=place)).bytes_host


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_layer_computes_while_the_next_one_is_on_its_way(monkeypatch, tmp_path, place):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served(place, tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    shelf.get(pieces[0])  # sends the first two layers
    for piece in [*pieces[2:], *pieces]:
        sent = len(gpu.copies.queue)
        shelf.get(piece)
        if piece.tensor == "k":
            assert len(gpu.copies.queue) > sent  # the next layer's
        gpu.copies.advance(sent)
        gpu.compute.advance(force=False)
        assert gpu.compute.done == len(gpu.compute.queue), f"{piece} waits for the layer after it"
    shelf.close()


@pytest.mark.parametrize("ahead", ["compute", "copies", "the host"])
def test_what_is_recorded_is_what_was_put(monkeypatch, tmp_path, ahead):
    gpu, recorder = GPU(monkeypatch, ahead), Recorder(tmp_path / "source.kvlock")
    recorder.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    pieces = [Piece(0, "blocks", i, tensor) for i in range(LAYERS) for tensor in "kv"]
    for step in range(2):
        number = {piece: 100.0 * step + 2 * piece.block + (piece.tensor == "v") for piece in pieces}
        recorder.turn_to(step)
        put(gpu, recorder, number)
    gpu.finish()
    (folder,) = tmp_path.iterdir()
    for step in range(2):
        file = StepFile(folder / step_name(step))
        found = {piece: file.rows(piece).data.unique().tolist() for piece in file.pieces}
        assert found == {piece: [100.0 * step + 2 * piece.block + (piece.tensor == "v")] for piece in pieces}


def lost(event: Event) -> None:
    raise RuntimeError("an error of the device, after which every wait for it fails")


@pytest.mark.parametrize("place", ["disk", "recording"])
def test_after_an_error_of_the_device_nothing_stays(monkeypatch, tmp_path, place):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    if place == "recording":
        shelf.close()
        shelf = Recorder(tmp_path / "source.kvlock")
        shelf.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    shelf.turn_to(0)
    for piece in pieces[:3]:
        shelf.put(piece, Rows(gpu.empty()), BEFORE_ROPE)
    monkeypatch.setattr(Event, "synchronize", lost)
    with pytest.raises(RuntimeError, match="an error of the device"):
        shelf.close()
    assert [*tmp_path.iterdir()] == [] and writing() == []


def test_what_a_failed_call_put_is_in_no_later_file_and_holds_no_memory(monkeypatch, tmp_path):
    gpu, recorder = GPU(monkeypatch, "the host"), Recorder(tmp_path / "source.kvlock")
    recorder.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    recorder.turn_to(5)
    recorder.put(Piece(0, "blocks", 0, "k"), Rows(gpu.empty()), BEFORE_ROPE)
    recorder.clear()
    gpu.finish()
    assert len(gpu.freed) == 1 and gpu.pinned_bytes == 0
    recorder.turn_to(6)
    recorder.seal()
    (folder,) = tmp_path.iterdir()
    assert StepFile(folder / step_name(6)).pieces == []
    recorder.close()


def test_a_file_is_written_while_the_source_computes_and_few_rows_are_on_their_way(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    shelf.turn_to(0)
    computed = []
    for number, piece in enumerate(pieces, 1):
        rows = gpu.empty()
        gpu.compute.add(partial(computed.append, number))
        shelf.put(piece, Rows(rows), BEFORE_ROPE)
        del rows
        assert len(computed) <= max(0, number - LAYERS_ON_DEVICE)  # the host waits for no later one
        assert number - len(gpu.freed) <= LAYERS_ON_DEVICE
        assert gpu.pinned_bytes <= 2 * LAYERS_ON_DEVICE * torch.zeros(SHAPE).nbytes
    shelf.close()


@pytest.mark.parametrize("inference", [False, True])
def test_keys_and_values_are_written_at_the_same_time_while_the_host_goes_on(monkeypatch, tmp_path, inference):
    gpu, add, both, end = GPU(monkeypatch, "the host"), StepWriter.add, threading.Barrier(3), threading.Event()

    def wait(writer: StepWriter, piece: Piece, rows: Rows) -> None:
        if piece.block == 0:
            both.wait(timeout=10)  # for the host and the writer of the other file
            assert end.wait(timeout=10)
        add(writer, piece, rows)

    monkeypatch.setattr(StepWriter, "add", wait)
    shelf, pieces = served("disk", tmp_path)
    with torch.inference_mode(inference):
        shelf.turn_to(0)
        for number, piece in enumerate(pieces):
            shelf.put(piece, Rows(torch.full(SHAPE, float(number))), BEFORE_ROPE)
            if number == 2 * LAYERS_ON_DEVICE - 1:
                both.wait(timeout=10)
                end.set()
        shelf.seal()
        found = []
        for piece in pieces:
            memory = shelf.get(piece).data.detach()
            gpu.compute.add(lambda memory=memory: found.append(memory.unique().item()))
        shelf.close()
        gpu.finish()
    assert found == [*range(len(pieces))] and writing() == []


def writing() -> list[str]:
    """The threads that write files."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvlock")]


@pytest.mark.parametrize("tensor", "kv")
def test_a_disk_that_is_full_is_told_of_and_the_next_step_is_whole(monkeypatch, tmp_path, tensor):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    held: list[weakref.ref] = []

    def forward() -> None:
        activation = torch.zeros(1)
        held.append(weakref.ref(activation))
        for piece in pieces[2:]:
            shelf.put(piece, Rows(gpu.empty()), BEFORE_ROPE)
        shelf.seal()

    shelf.turn_to(0)
    for piece in pieces[:2]:
        shelf.put(piece, Rows(gpu.empty()), BEFORE_ROPE)
    gc.disable()
    try:
        with Path("/dev/full").open("wb", buffering=0) as full:
            shelf._writers[tensor]._file = full
            try:
                forward()
            except ValueError as error:
                said = str(error)
        shelf.clear()
        assert said.startswith("cannot write ") and said.endswith(f"{tensor}.safetensors: No space left on device")
        assert held[0]() is None and gpu.pinned_bytes == 0, "an error that is over holds memory"
    finally:
        gc.enable()
    shelf.turn_to(1)
    put(gpu, shelf, {piece: float(number) for number, piece in enumerate(pieces)})
    assert [shelf._file.rows(piece).data.unique().item() for piece in pieces] == [*range(len(pieces))]
    shelf.close()
    gpu.finish()
    assert [*tmp_path.iterdir()] == [] and writing() == []


def test_files_are_closed_after_the_threads_that_write_them(monkeypatch, tmp_path):
    GPU(monkeypatch, "the host")
    add, closed = StepWriter.add, []

    def slow(writer: StepWriter, piece: Piece, rows: Rows) -> None:
        time.sleep(0.1)
        add(writer, piece, rows)
        closed.append(writer._file.closed)

    monkeypatch.setattr(StepWriter, "add", slow)
    shelf, pieces = served("disk", tmp_path)
    shelf.turn_to(0)
    for piece in pieces[:4]:
        shelf.put(piece, Rows(torch.ones(SHAPE)), BEFORE_ROPE)
    shelf.close()
    assert closed == [False] * 2  # the others were still to be copied
    assert [*tmp_path.iterdir()] == [] and writing() == []


def test_a_step_that_lacks_values_is_not_given_those_of_the_step_before(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    shelf.turn_to(1)
    with pytest.raises(ValueError, match=r"k.safetensors holds no source rows: 0.blocks.0.k is not whole"):
        put(gpu, shelf, dict.fromkeys(pieces[::2], 1.0))
    shelf.close()


@pytest.mark.parametrize("place", ["disk", "recording"])
def test_rows_of_all_layers_go_through_the_same_few_rooms(monkeypatch, tmp_path, place):
    made, room_for = [], transit.room_for
    gpu = GPU(monkeypatch, "the host")

    def counted(rows: Rows, before: Rows | None, device: torch.device, *, pinned: bool = False) -> Rows:
        room = room_for(rows, before, torch.device("cpu"))
        made.extend([room] if room is not before else [])
        return room

    monkeypatch.setattr(transit, "room_for", counted)
    monkeypatch.setattr(transit, "copy", lambda *_, **__: None)
    shelf = Recorder(tmp_path / "source.kvlock") if place == "recording" else served(place, tmp_path)[0]
    shelf.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    shelf.turn_to(0)
    for piece in (Piece(0, "blocks", i, tensor) for i in range(LAYERS) for tensor in "kv"):
        mean = torch.ones(1, 2) if piece.tensor == "k" else None
        shelf.put(piece, Rows(torch.ones(SHAPE, dtype=torch.int8), torch.ones(1, 3), mean), BEFORE_ROPE)
    shelf.seal()
    assert len(made) <= 2 * LAYERS_ON_DEVICE
    gpu.finish()
    shelf.close()
