"""What is begun to be written to the disk early: bytes of files that the system would hold a later step up for."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from os import fstat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import GPU, LAYERS, SHAPE, put, served

from kvlock import places, write_back
from kvlock.step_file import HEADER_BYTES, Piece, StepFile, StepWriter
from kvlock.store import LAYERS_AT_ONCE, Rows

CACHESTAT = 451  # number of the system call on x86-64 and aarch64
BYTES = torch.zeros(SHAPE).nbytes + 40  # of a piece, with what fills it up to 64 bytes


def dirty_pages(file: int, start: int, size: int) -> int:
    """Pages of a part of a file that wait for the system to begin with them."""
    part, counts = (ctypes.c_uint64 * 2)(start, size), (ctypes.c_uint64 * 5)()
    if ctypes.CDLL(None, use_errno=True).syscall(CACHESTAT, file, part, counts, 0):
        pytest.skip("needs the system call cachestat, of Linux 6.5, and to be let call it")
    return counts[1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_pages_that_wait_for_the_system_are_begun_with(tmp_path):
    size = 2**22
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(bytes(2 * size))
        if not dirty_pages(file.fileno(), size, size):
            pytest.skip(f"no page that waits for a disk can be seen on the file system of {tmp_path}")
        write_back.begin(file.fileno(), size, size)
        assert dirty_pages(file.fileno(), size, size) == 0


def test_the_system_is_told_which_bytes_and_to_wait_for_none(monkeypatch):
    calls = []

    def sync_file_range(*arguments: object) -> int:
        calls.append(tuple(getattr(each, "value", each) for each in arguments))
        assert [type(each) for each in arguments[1:3]] == [ctypes.c_int64] * 2  # an int would have 32 bits
        return -1  # an error, of a pipe for example

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(sync_file_range=sync_file_range))
    write_back.begin(3, 2**33, 2**32)
    assert calls == [(3, 2**33, 2**32, 2)]  # SYNC_FILE_RANGE_WRITE


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_a_system_that_cannot_be_told_is_not(monkeypatch, tmp_path, error):
    def load(name: None) -> object:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", load)
    with (tmp_path / "file").open("wb") as file:
        write_back.begin(file.fileno(), 0, 1)


def test_the_system_says_how_much_may_wait(monkeypatch, tmp_path):
    monkeypatch.setattr(write_back, "VMSTAT", tmp_path / "vmstat")
    assert write_back.background_bytes() == math.inf
    write_back.VMSTAT.write_text("nr_dirty 7\nnr_dirty_threshold 30\nnr_dirty_background_threshold 15\n")
    assert write_back.background_bytes() == 15 * mmap.PAGESIZE
    for odd in ("nr_dirty 7\n", "nr_dirty_background_threshold\n", "nr_dirty_background_threshold few\n", "é\n"):
        write_back.VMSTAT.write_text(odd, encoding="utf-8")
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


def test_all_parts_of_a_piece_are_begun_with_once_they_are_written(monkeypatch, tmp_path):
    sizes = []
    begin = lambda file, start, size: sizes.append((start + size, fstat(file).st_size))
    monkeypatch.setattr(write_back, "begin", begin)
    writer = StepWriter(tmp_path / "step", early_from=0)
    rows = Rows(torch.zeros(1, 2**14, 4, 16, dtype=torch.int8), torch.zeros(1, 2**14, 4))
    writer.add(Piece(0, "blocks", 0, "k"), rows)
    writer.add(Piece(0, "blocks", 1, "k"), Rows(torch.zeros(1, 0, 4)))
    assert sizes == [(HEADER_BYTES + rows.bytes_kept, HEADER_BYTES + rows.bytes_kept)]
    writer.close()


def test_a_file_of_a_recording_is_left_to_the_system(tmp_path, begun):
    writer = StepWriter(tmp_path / "step")
    writer.add(Piece(0, "blocks", 0, "k"), Rows(torch.zeros(SHAPE)))
    writer.close()
    assert begun == []


def test_half_of_what_may_wait_is_left_to_other_files(monkeypatch, tmp_path):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served("disk", tmp_path)
    shelf.turn_to(0)
    put(gpu, shelf, dict.fromkeys(pieces, 0.0))
    monkeypatch.setattr(write_back, "background_bytes", lambda: shelf.bytes_kept - 1)
    assert shelf._left_to_wait() * 2 * LAYERS_AT_ONCE == (shelf.bytes_kept - 1) / 2
    shelf.close()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("share", [1, 6])  # most of a file is what fills pieces up here
@pytest.mark.parametrize("allowed", [0, 2, 5, LAYERS, 2 * LAYERS - 1, 2 * LAYERS, math.inf])
def test_a_part_of_what_may_wait_is_left_but_after_a_step_of_less(monkeypatch, tmp_path, begun, allowed, share, on_gpu):
    gpu = GPU(monkeypatch, "the host")
    monkeypatch.setattr(places, "LEFT_TO_WAIT", share)
    bytes_of_rows = torch.zeros(SHAPE).nbytes  # `allowed` is in pieces
    monkeypatch.setattr(write_back, "background_bytes", lambda: allowed * bytes_of_rows)
    shelf, pieces = served("disk", tmp_path)
    if not on_gpu:
        monkeypatch.setattr(type(shelf), "_copy_stream", None)
    for step in range(3):
        begun.clear()
        shelf.turn_to(step)
        put(gpu, shelf, {piece: float(number + step) for number, piece in enumerate(pieces)})
        left = share * allowed * bytes_of_rows / (2 * LAYERS_AT_ONCE)  # of each file
        ends = [(layer // LAYERS_AT_ONCE + 1) * BYTES for layer in range(LAYERS)]
        late = 2 * sum(end > left for end in ends)  # K and V
        assert len(begun) == (late if step == 0 or allowed < 2 * LAYERS else 0)
        assert not begun or {size for _, _, size in begun} == {BYTES}
    (folder,) = tmp_path.iterdir()
    found = StepFile(*sorted(folder.iterdir()))
    if on_gpu:
        assert [found.rows(piece).data.unique().item() for piece in pieces] == [*range(2, len(pieces) + 2)]
    shelf.close()
    gpu.finish()
