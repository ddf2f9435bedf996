"""What is begun to be written to the disk early: bytes of files that the system would hold a later step up for."""

from __future__ import annotations

import ctypes
import math
import mmap
from pathlib import Path

import pytest
import torch
from simulated_gpu import GPU, LAYERS, SHAPE, put, served

from kvlock import write_back
from kvlock.step_file import HEADER_BYTES, Piece, StepFile, StepWriter
from kvlock.store import LAYERS_AT_ONCE, Rows

CACHESTAT = 451  # number of the system call, the same for all processors
BYTES = torch.zeros(SHAPE).nbytes + 40  # of a piece, with what fills it up to 64 bytes


def dirty_pages(file: int, start: int, size: int) -> int:
    """Pages of a part of a file that wait for the system to begin with them."""
    part, counts = (ctypes.c_uint64 * 2)(start, size), (ctypes.c_uint64 * 5)()
    if ctypes.CDLL(None, use_errno=True).syscall(CACHESTAT, file, part, counts, 0):
        pytest.skip("needs cachestat, of Linux 6.5")
    return counts[1]


def test_pages_that_wait_for_the_system_are_begun_with(tmp_path):
    size = 2**22
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(bytes(2 * size))
        if not dirty_pages(file.fileno(), size, size):
            pytest.skip(f"the file system of {tmp_path} has no pages that wait for a disk")
        write_back.begin(file.fileno(), size, size)
        assert dirty_pages(file.fileno(), size, size) == 0


@pytest.mark.parametrize("library", ["none", "lacks it"])
def test_a_system_that_cannot_be_told_is_not(monkeypatch, tmp_path, library):
    def load(name: None) -> object:
        if library == "none":
            raise TypeError("Windows wants a name")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    with (tmp_path / "file").open("wb") as file:
        write_back.begin(file.fileno(), 0, 1)


def test_the_system_says_how_much_may_wait(monkeypatch, tmp_path):
    monkeypatch.setattr(write_back, "VMSTAT", tmp_path / "vmstat")
    assert write_back.background_bytes() == math.inf
    write_back.VMSTAT.write_text("nr_dirty 7\nnr_dirty_threshold 30\nnr_dirty_background_threshold 15\n")
    assert write_back.background_bytes() == 15 * mmap.PAGESIZE
    write_back.VMSTAT.write_text("nr_dirty 7\n")
    assert write_back.background_bytes() == math.inf


@pytest.mark.skipif(not Path("/proc/vmstat").exists(), reason="needs Linux")
def test_linux_is_asked_what_it_has() -> None:
    assert mmap.PAGESIZE < write_back.background_bytes() < 2**50


@pytest.fixture
def begun(monkeypatch) -> list[tuple[int, int, int]]:
    """File, start and size of what is begun."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(write_back, "begin", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(("early_from", "first"), [(math.inf, 4), (0, 0), (BYTES, 1), (2 * BYTES - 1, 1)])
def test_what_comes_after_the_first_bytes_of_a_file_is_begun_with(tmp_path, begun, early_from, first):
    writer = StepWriter(tmp_path / "step", early_from=early_from)
    for block in range(4):
        writer.add(Piece(0, "blocks", block, "k"), Rows(torch.zeros(SHAPE)))
    assert [call[1:] for call in begun] == [(HEADER_BYTES + i * BYTES, BYTES) for i in range(first, 4)]
    assert {call[0] for call in begun} <= {writer._file.fileno()}
    writer.close()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("layers", [0, 2, 3, LAYERS])
def test_a_step_leaves_half_of_what_may_wait_to_the_system(monkeypatch, tmp_path, begun, layers, on_gpu):
    gpu = GPU(monkeypatch, "the host")
    monkeypatch.setattr(write_back, "background_bytes", lambda: 2 * 2 * layers * BYTES)  # K and V
    shelf, pieces = served("disk", tmp_path)
    if not on_gpu:
        monkeypatch.setattr(type(shelf), "_copy_stream", None)
    for step in range(2):
        begun.clear()
        shelf.turn_to(step)
        put(gpu, shelf, {piece: float(number + step) for number, piece in enumerate(pieces)})
        per_file = [-(-(LAYERS - turn) // LAYERS_AT_ONCE) for turn in range(LAYERS_AT_ONCE)]
        left = layers / LAYERS_AT_ONCE
        assert len(begun) == 2 * sum(sum(number + 1 > left for number in range(count)) for count in per_file)
        assert not begun or {size for _, _, size in begun} == {BYTES}
    (folder,) = tmp_path.iterdir()
    found = StepFile(*sorted(folder.iterdir()))
    if on_gpu:
        assert [found.rows(piece).data.unique().item() for piece in pieces] == [*range(1, len(pieces) + 1)]
    shelf.close()
    gpu.finish()
