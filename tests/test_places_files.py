"""Rows that leave a GPU for files: who writes them and when, what they hold, and what stays after an error."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from simulated_gpu import GPU, LAYERS, SHAPE, Event, Stream, put, served

from kvlock import pinned, transit
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.manifest import step_name
from kvlock.recorder import Recorder
from kvlock.step_file import Piece, StepFile, StepWriter
from kvlock.store import LAYERS_AT_ONCE, Rows


def lost(waited_for: Event | Stream) -> None:
    raise RuntimeError("an error of the device, after which every wait for it fails")


@pytest.mark.parametrize("place", ["host", "disk", "recording"])
def test_after_an_error_of_the_device_nothing_stays(monkeypatch, tmp_path, place):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk" if place == "recording" else place, tmp_path)
    if place == "recording":
        shelf.close()
        shelf = Recorder(tmp_path / "source.kvlock")
        shelf.serve(torch.device("cuda"), [(0, "blocks", i) for i in range(LAYERS)])
    shelf.turn_to(0)
    for piece in pieces[:3]:
        shelf.put(piece, Rows(gpu.empty()), BEFORE_ROPE)
    monkeypatch.setattr(Event, "synchronize", lost)
    monkeypatch.setattr(Stream, "synchronize", lost)
    monkeypatch.setattr(pinned, "unpin", lambda memory: gpu.registered.pop(memory.data_ptr()))
    with pytest.raises(RuntimeError, match="an error of the device"):
        shelf.close()
    assert [*tmp_path.iterdir()] == [] and writing() == []
    assert gpu.registered == {} and (place != "host" or len(gpu.freed) == 3)


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


@pytest.mark.parametrize(("place", "leaving"), [("host", transit.LEAVING), ("disk", 2)])
def test_rows_are_put_while_the_source_computes_and_few_are_on_their_way(monkeypatch, tmp_path, place, leaving):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served(place, tmp_path)
    shelf.turn_to(0)
    computed = []
    for number, piece in enumerate(pieces, 1):
        rows = gpu.empty()
        gpu.compute.add(partial(computed.append, number))
        shelf.put(piece, Rows(rows), BEFORE_ROPE)
        del rows
        assert len(computed) <= max(0, number - leaving)  # the host waits for no later one
        assert number - len(gpu.freed) <= leaving
        if place == "disk":
            assert gpu.pinned_bytes <= 2 * (1 + LAYERS_AT_ONCE) * torch.zeros(SHAPE).nbytes
    shelf.close()


@pytest.mark.parametrize("inference", [False, True])
def test_several_layers_are_written_at_the_same_time_while_the_host_goes_on(monkeypatch, tmp_path, inference):
    gpu, add = GPU(monkeypatch, "the host"), StepWriter.add
    all_, end = threading.Barrier(1 + 2 * LAYERS_AT_ONCE), threading.Event()

    def wait(writer: StepWriter, piece: Piece, rows: Rows) -> None:
        if piece.block < LAYERS_AT_ONCE:
            all_.wait(timeout=10)  # for the host and the writers of the other files
            assert end.wait(timeout=10)
        add(writer, piece, rows)

    monkeypatch.setattr(StepWriter, "add", wait)
    shelf, pieces = served("disk", tmp_path)
    with torch.inference_mode(inference):
        shelf.turn_to(0)
        for number, piece in enumerate(pieces):
            shelf.put(piece, Rows(torch.full(SHAPE, float(number))), BEFORE_ROPE)
            if number == 2 * (1 + LAYERS_AT_ONCE) - 1:
                all_.wait(timeout=10)
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
            shelf._writers[f"{tensor}0.safetensors"]._file = full
            try:
                forward()
            except ValueError as error:
                said = str(error)
        shelf.clear()
        assert said.startswith("cannot write ") and said.endswith(f"{tensor}0.safetensors: No space left on device")
        assert held[0]() is None and gpu.pinned_bytes == 0, "an error that is over holds memory"
    finally:
        gc.enable()
    shelf.turn_to(1)
    put(gpu, shelf, {piece: float(number) for number, piece in enumerate(pieces)})
    assert [shelf._file.rows(piece).data.unique().item() for piece in pieces] == [*range(len(pieces))]
    shelf.close()
    gpu.finish()
    assert [*tmp_path.iterdir()] == [] and writing() == []


@pytest.mark.parametrize("last", range(1, 2 * (1 + LAYERS_AT_ONCE) + 1))
def test_an_error_of_one_of_the_last_writes_is_told_of(monkeypatch, tmp_path, last):
    GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    add = StepWriter.add

    def fail(writer: StepWriter, piece: Piece, rows: Rows) -> None:
        if piece == pieces[-last]:
            raise ValueError(f"{piece} cannot be written")
        add(writer, piece, rows)

    monkeypatch.setattr(StepWriter, "add", fail)
    shelf.turn_to(0)
    for piece in pieces:
        shelf.put(piece, Rows(torch.ones(SHAPE)), BEFORE_ROPE)
    with pytest.raises(ValueError, match=f"{pieces[-last]} cannot be written"):
        shelf.seal()
    shelf.close()
    assert [*tmp_path.iterdir()] == [] and writing() == []


def test_layers_that_lock_take_turns_in_the_files_whatever_their_numbers(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, _ = served("disk", tmp_path)
    pieces = [Piece(0, "blocks", block, tensor) for block in (0, 4, 2) for tensor in "kv"]
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    assert len([*tmp_path.rglob("*.safetensors")]) == 2 * LAYERS_AT_ONCE
    shelf.close()


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
    with pytest.raises(ValueError, match=r"k1.safetensors holds no source rows: 0.blocks.0.k is not whole"):
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
    assert len(made) <= 2 * (1 + (1 if place == "recording" else LAYERS_AT_ONCE))
    gpu.finish()
    shelf.close()
