"""Pinned memory of the host: as much as is asked for, used again from step to step, and given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import GPU, LAYERS, SHAPE, put, served

from kvlock.locked_layers import BEFORE_ROPE
from kvlock.memory import is_out_of_memory
from kvlock.pinned import PinnedMemory
from kvlock.store import Rows

BYTES = torch.zeros(SHAPE).nbytes


@pytest.mark.parametrize("inference", [False, True])
def test_every_step_and_expert_has_the_memory_of_the_first_whatever_mode_a_call_is_in(monkeypatch, tmp_path, inference):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    addresses = []
    for step, mode in enumerate((inference, False, inference)):
        with torch.inference_mode(mode):
            shelf.turn_to(step)
            put(gpu, shelf, {piece._replace(expert=step // 2): float(step) for piece in pieces})
            addresses.append([*gpu.registered])
            gpu.finish()
    assert len(addresses[0]) == len(pieces) and addresses[1:] == addresses[:1] * 2
    assert gpu.pinned_bytes == len(pieces) * BYTES
    for piece in pieces:
        assert shelf.get(piece._replace(expert=1)).data.shape == SHAPE
    shelf.close()
    assert gpu.registered == {}


def test_memory_for_rows_of_another_size_replaces_that_of_before(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    for step, rows in enumerate((3, 1, 5)):
        shelf.turn_to(step)
        for piece in pieces:
            shelf.put(piece, Rows(torch.full((1, rows, 2), float(step))), BEFORE_ROPE)
        shelf.seal()
        assert gpu.pinned_bytes == LAYERS * 2 * 2 * rows * 4
        kept = [shelf._load(piece.layer)[piece.tensor].data for piece in pieces]
        gpu.finish()
        assert all(torch.equal(data, torch.full((1, rows, 2), float(step))) for data in kept)
    shelf.close()


def test_a_shelf_that_nobody_closes_gives_its_memory_back(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("host", tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    gpu.finish()
    assert gpu.registered
    del shelf
    assert gpu.registered == {}


def test_rows_that_are_none_take_no_memory(monkeypatch):
    gpu, memory = GPU(monkeypatch, "the host"), PinnedMemory()
    assert memory.empty_like(torch.empty(1, 0, 2)).shape == (1, 0, 2)
    memory.free([None, torch.empty(3)])
    assert gpu.registered == {}


@pytest.mark.gpu
def test_a_gpu_copies_by_itself_to_and_from_memory_of_any_size():
    memory = PinnedMemory()
    for size in (1, 3, 1000, 2**20 + 1):
        rows = torch.randn(size, 3, device="cuda", dtype=torch.bfloat16)
        rooms = [memory.empty_like(rows) for _ in range(3)]
        assert all(room.is_pinned() and room.shape == rows.shape and room.dtype == rows.dtype for room in rooms)
        for room in rooms:
            room.copy_(rows, non_blocking=True)
        back = [room.to("cuda", non_blocking=True) for room in rooms]
        torch.cuda.synchronize()
        assert all(torch.equal(each, rows) for each in back)
        memory.free(rooms[:2])
        assert [room.is_pinned() for room in rooms] == [False, False, True]
    memory.free_all()
    assert not rooms[2].is_pinned() and torch.equal(rooms[2], rows.cpu())


@pytest.mark.parametrize(("code", "said"), [(2, "out of memory"), (801, "CUDA error 801")])
def test_memory_that_cannot_be_pinned_is_told_of_and_not_held(monkeypatch, code, said):
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: code, cudaHostUnregister=pytest.fail)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = PinnedMemory()
    with pytest.raises(RuntimeError, match=f"cannot pin 24 bytes of host memory: {said}") as error:
        memory.empty_like(torch.empty(3, 2))
    assert is_out_of_memory(error.value) == (code == 2)
    memory.free_all()


def test_memory_that_the_host_has_not_is_told_of():
    with pytest.raises(MemoryError, match=r"cannot take 4611686018427387904 bytes of host memory: "):
        PinnedMemory().empty_like(torch.empty(2**62, dtype=torch.int8, device="meta"))
