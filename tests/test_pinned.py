"""Pinned memory of the host: as much as is asked for, used again from step to step, and given back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import GPU, SHAPE, put, served

from kvlock import pinned
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.memory import is_out_of_memory
from kvlock.pinned import PinnedMemory
from kvlock.places import Shelf
from kvlock.step_file import Piece
from kvlock.store import Rows

BYTES = torch.zeros(SHAPE).nbytes


@pytest.mark.parametrize("inference", [False, True])
def test_every_step_and_expert_has_the_memory_of_the_first_whatever_mode_a_call_is_in(monkeypatch, tmp_path, inference):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    pins: list[torch.Tensor] = []
    monkeypatch.setattr(pinned, "pin", lambda memory: [pins.append(memory), gpu.pin(memory)])
    for step, mode in enumerate((inference, False, inference)):
        with torch.inference_mode(mode):
            shelf.turn_to(step)
            put(gpu, shelf, {piece._replace(expert=step // 2): float(step) for piece in pieces})
            gpu.finish()
    assert len(pins) == len(pieces) and gpu.pinned_bytes == len(pieces) * BYTES
    assert shelf.bytes_kept == len(pieces) * BYTES
    with torch.inference_mode(inference):
        for piece in pieces:
            memory = shelf.get(piece._replace(expert=1)).data
            gpu.finish()
            assert torch.equal(memory, torch.full(SHAPE, 2.0))
        shelf.turn_to(3)
        put(gpu, shelf, dict.fromkeys(pieces[:4], 3.0))  # an expert with fewer blocks
        gpu.finish()
    assert shelf.bytes_kept == 4 * BYTES
    shelf.close()
    assert gpu.registered == {}


def test_memory_for_rows_of_another_size_replaces_that_of_before(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    for step, rows in enumerate((3, 1, 5)):
        shelf.turn_to(step)
        for piece in pieces:
            shelf.put(piece, packed(rows, float(step)), BEFORE_ROPE)
        shelf.seal()
        assert gpu.pinned_bytes == shelf.bytes_kept == len(pieces) * packed(rows, 0.0).bytes_kept
        kept = [shelf._load(piece.layer)[piece.tensor].data for piece in pieces]
        gpu.finish()
        assert all(torch.equal(data, torch.full((1, rows, 2), float(step))) for data in kept)
    shelf.close()
    assert gpu.registered == {}


def packed(rows: int, value: float) -> Rows:
    """Rows with their scale and mean."""
    return Rows(torch.full((1, rows, 2), value), torch.ones(1, rows), torch.ones(1, 2))


def filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[GPU, Shelf, list[Piece]]:
    """A shelf with the rows of a step, whose copies are over."""
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    gpu.finish()
    return gpu, shelf, pieces


def test_after_memory_that_could_not_be_pinned_the_next_step_has_what_it_needs(monkeypatch, tmp_path):
    gpu, shelf, pieces = filled(monkeypatch, tmp_path)

    def pin(memory: torch.Tensor) -> None:
        if memory.nbytes == 9 * 2 * 4:  # data, which follows scale and mean
            raise RuntimeError("full")
        gpu.pin(memory)

    monkeypatch.setattr(pinned, "pin", pin)
    shelf.turn_to(1)
    with pytest.raises(RuntimeError, match="full"):
        shelf.put(pieces[0], packed(9, 1.0), BEFORE_ROPE)
    assert len(gpu.registered) == len(pieces) - 1
    monkeypatch.setattr(pinned, "pin", gpu.pin)
    shelf.turn_to(2)
    put(gpu, shelf, dict.fromkeys(pieces, 2.0))  # as large as at first, and no memory of then that is pinned no more
    assert gpu.pinned_bytes == shelf.bytes_kept == len(pieces) * BYTES
    shelf.close()
    assert gpu.registered == {}


def test_memory_is_pinned_for_the_device_that_a_call_is_on(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    for step, device in enumerate(("cpu", "cuda", "cpu", "cuda")):
        shelf.serve(torch.device(device), ())
        shelf.turn_to(step)
        for piece in pieces:
            shelf.put(piece, Rows(torch.full(SHAPE, float(step))), BEFORE_ROPE)
        shelf.seal()
        if device == "cuda":
            shelf.get(pieces[0])  # and the copy is still to come when the device is left
        assert len(gpu.registered) == (len(pieces) if device == "cuda" else 0)
    shelf.close()
    assert gpu.registered == {}


def test_a_shelf_that_nobody_closes_gives_its_memory_back(monkeypatch, tmp_path):
    gpu, shelf, _ = filled(monkeypatch, tmp_path)
    assert gpu.registered
    del shelf
    assert gpu.registered == {}


def test_rows_that_are_none_take_no_memory(monkeypatch):
    gpu = GPU(monkeypatch, "the host")
    with torch.device("meta"):
        room = PinnedMemory().empty_like(torch.empty(1, 0, 2))
    assert (room.shape, room.device.type, gpu.registered) == ((1, 0, 2), "cpu", {})


@pytest.mark.parametrize(("code", "said"), [(2, "out of memory"), (801, "CUDA error 801")])
def test_memory_that_cannot_be_pinned_is_told_of_and_not_held(monkeypatch, code, said):
    runtime, forgotten = SimpleNamespace(cudaHostRegister=lambda *_: code, cudaHostUnregister=pytest.fail), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned, "forget_error", lambda: forgotten.append(code))
    memory = PinnedMemory()
    with pytest.raises(RuntimeError, match=f"cannot pin 24 bytes of host memory: {said}") as error:
        memory.empty_like(torch.empty(3, 2))
    assert is_out_of_memory(error.value) == (code == 2) and forgotten == [code]
    memory.free()


def test_memory_that_the_host_has_not_is_told_of():
    with pytest.raises(MemoryError, match=r"cannot take 4611686018427387904 bytes of host memory: "):
        PinnedMemory().empty_like(torch.empty(2**62, dtype=torch.int8, device="meta"))


@pytest.mark.gpu
def test_a_gpu_copies_by_itself_to_and_from_memory_of_any_size():
    for size in (1, 3, 1000, 2**20 + 1):
        rows = torch.randn(size, 3, device="cuda", dtype=torch.bfloat16)
        memories = [PinnedMemory() for _ in range(3)]
        rooms = [memory.empty_like(rows) for memory in memories]
        assert all(room.is_pinned() and room.shape == rows.shape and room.dtype == rows.dtype for room in rooms)
        for room in rooms:
            room.copy_(rows, non_blocking=True)
        back = [room.to("cuda", non_blocking=True) for room in rooms]
        torch.cuda.synchronize()
        assert all(torch.equal(each, rows) for each in back)
        memories[0].free()
        assert [room.is_pinned() for room in rooms] == [False, True, True]
        assert torch.equal(rooms[0], rows.cpu())


@pytest.mark.gpu
def test_an_error_of_pinning_is_no_error_of_what_comes_after_it(monkeypatch):
    pages = pinned._pages(8)
    monkeypatch.setattr(pinned, "_pages", lambda size: pages)  # the same memory twice
    first, second = PinnedMemory(), PinnedMemory()
    first.empty_like(torch.empty(2))
    with pytest.raises(RuntimeError, match="cannot pin 8 bytes of host memory"):
        second.empty_like(torch.empty(2))
    assert torch.ones(1, device="cuda").add_(1).item() == 2
    pinned.unpin(first._held[0])
    first.free()
    assert torch.ones(1, device="cuda").add_(1).item() == 2
