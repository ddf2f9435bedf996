"""The benchmark of rows on a disk, at a pace at which its times mean nothing."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import disk
from benchmarks._modes import KAPPA
from kvlock import Store, write_back
from kvlock.places import shelf_of
from kvlock.step_file import Piece
from kvlock.store import Rows

TINY = disk.Pace(layers=3, gib=2**-20, plain=0.02)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.Pace, "of", lambda shape: TINY)
    monkeypatch.setattr(disk, "PROBE", 2**12)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """What is begun with, where little may wait."""
    monkeypatch.setattr(write_back, "background_bytes", lambda: 0)
    with mock.patch.object(write_back, "begin") as begin:
        yield begin


@pytest.mark.smoke
def test_steps_are_timed_with_the_early_beginning_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    disk.main([str(place), "--steps", "2", "--out", str(tmp_path), "--commit", "abc"])
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [disk.DiskRow(**line) for line in csv.DictReader(file)]
    assert path.name.startswith("disk-") and [row.writes for row in rows] == [disk.LEFT, disk.EARLY]
    assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()] == ["writes", disk.LEFT, disk.EARLY]
    for row in rows:
        assert float(row.pace_s) == 1.5 * float(row.plain_s) and row.steps == "2" and row.shape == "14b"
        assert 1 <= float(row.locked_ratio) <= float(row.slowest_ratio) and float(row.first_ratio) >= 1
        edit = 1 - KAPPA + KAPPA * 1.5 * float(row.locked_ratio)
        assert float(row.edit_ratio) == pytest.approx(edit, abs=1e-4)
        assert "close_file" in row.note and row.commit == "abc" and row.gpu and float(row.disk_mb_s) >= 0
    assert [*place.iterdir()] == []


def test_a_gpu_of_the_clock_computes_while_the_host_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(disk, "time", SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda seconds: setattr(clock, "now", clock.now + seconds)
    ))  # fmt: skip
    computing, copies = disk.Stream(), disk.Stream()
    computing.computes(2)
    first = computing.record_event()
    computing.computes(2)
    assert clock.now == 1
    copies.wait_event(first)
    copies.synchronize()  # no longer than the first layer takes
    assert clock.now == 3
    clock.now = 9  # the host is late, and the device has been idle
    computing.computes(2)
    copies.wait_stream(computing)
    copies.record_event().synchronize()
    first.synchronize()
    assert clock.now == 11


def test_memory_that_nobody_has_any_more_is_given_again() -> None:
    memory = disk.Memory()
    one, two = (memory.empty_like(torch.zeros(3)) for _ in range(2))
    addresses = one.data_ptr(), two.data_ptr()
    assert addresses[0] != addresses[1]
    del one
    assert memory.empty_like(torch.zeros(4)).data_ptr() not in addresses
    assert memory.empty_like(torch.zeros(3)).data_ptr() == addresses[0]


@pytest.mark.parametrize("writes", [disk.LEFT, disk.EARLY])
def test_what_is_left_to_the_system_is_not_begun_with(tmp_path: Path, begun: mock.Mock, writes: str) -> None:
    disk.measure(tmp_path, TINY, 1, writes)
    assert begun.call_count == (2 * 2 * TINY.layers if writes == disk.EARLY else 0)  # K and V, two steps


def test_rows_that_do_not_come_back_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, pieces = disk.step, [Piece(0, "blocks", 0, tensor) for tensor in "kv"]
    with disk.clocked() as gpu:
        shelf = shelf_of(Store(place="disk", folder=tmp_path))
        assert shelf is not None
        shelf.serve(torch.device("cuda"), [pieces[0].layer])
        real(shelf, gpu, 0, pieces, Rows(torch.zeros(1, 8, dtype=torch.uint8)), 0)
        monkeypatch.setattr(shelf, "get", lambda piece: Rows(torch.zeros(1, 8, dtype=torch.uint8)))
        with pytest.raises(ValueError, match=r"0\.blocks\.0\.k of step 1 came back as \[0, 0\]"):
            real(shelf, gpu, 1, pieces, Rows(torch.zeros(1, 8, dtype=torch.uint8)), 0)
        shelf.close()


def test_torch_is_as_it_was_before(tmp_path: Path) -> None:
    before = torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.stream, torch.get_num_threads()
    disk.main([str(tmp_path), "--steps", "1"])
    assert (torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.stream, torch.get_num_threads()) == before


@pytest.mark.parametrize(("options", "message"), [
    (["--steps", "0"], "--steps 0 and --gib None want to be above 0"),
    (["--gib", "-1"], "--steps 5 and --gib -1.0 want to be above 0"),
    (["--gib", "nan"], "--steps 5 and --gib nan want to be above 0"),
    (["--gib", "1e9"], "GiB free; wanted 1000000000.0"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_an_error_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path / "none")])
    assert f"cannot write to {tmp_path / 'none'}: No such file or directory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/mounts").exists(), reason="needs Linux")
def test_a_file_system_has_the_name_that_the_system_gives_it(tmp_path: Path) -> None:
    assert disk.file_system(Path("/proc/self")) == "proc"
    assert disk.file_system(tmp_path.resolve()) not in ("", "proc")


def test_the_pace_is_that_of_the_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pace = disk.Pace.of("14b")
    assert (pace.layers, pace.gib) == (40, 19.47) and math.isclose(pace.locked, 1.5 * pace.plain)
