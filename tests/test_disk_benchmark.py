"""The benchmark of rows on a disk, at a pace at which its times mean nothing."""

import csv
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import _clock, _disk_table, disk
from benchmarks._machine import Machine
from benchmarks._modes import KAPPA
from kvlock import Store, transit, write_back
from kvlock.places import Shelf, shelf_of
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
    disk.main([str(place), "--disk", "a disk", "--steps", "2", "--out", str(tmp_path), "--commit", "abc"])
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [disk.DiskRow(**line) for line in csv.DictReader(file)]
    assert path.name.startswith("disk-") and [row.writes for row in rows] == [disk.LEFT, disk.EARLY]
    assert [line.split(",")[2] for line in capsys.readouterr().out.splitlines()] == ["writes", disk.LEFT, disk.EARLY]
    for row in rows:
        assert float(row.pace_s) == 1.5 * float(row.plain_s) and row.steps == "2" and row.shape == "14b"
        assert 1 <= float(row.locked_ratio) <= float(row.slowest_ratio) and float(row.first_ratio) >= 1
        edit = 1 - KAPPA + KAPPA * 1.5 * float(row.locked_ratio)
        assert float(row.edit_ratio) == pytest.approx(edit, abs=1e-4)
        assert "close_file" in row.note and row.commit == "abc" and row.disk == "a disk"
        assert row.gpu and row.system and int(row.cores) > 0
        written = TINY.gib * 2**30 / TINY.locked
        assert float(row.disk_ratio) == pytest.approx(1e6 * float(row.disk_mb_s) / written, rel=0.1)
    assert [*place.iterdir()] == []


def test_a_step_writes_all_layers_and_reads_them_twice_while_each_computes() -> None:
    pieces, calls = [Piece(0, "blocks", block, tensor) for block in range(2) for tensor in "kv"], []
    rows, kept = Rows(torch.zeros(1, 8, dtype=torch.uint8)), {}
    gpu = SimpleNamespace(
        computes=lambda seconds: calls.append(seconds), synchronize=lambda: calls.append("over"),
    )  # fmt: skip

    def put(piece: Piece, rows: Rows, point: str) -> None:
        calls.append(("put", piece))
        kept[piece] = Rows(rows.data.clone())

    def get(piece: Piece) -> Rows:
        calls.append(("get", piece))
        return kept[piece]

    shelf = SimpleNamespace(
        turn_to=lambda number: calls.append(number), put=put, seal=lambda: calls.append("sealed"), get=get
    )
    disk.step(shelf, gpu, 7, pieces, rows, 8.0)
    layers = lambda name: [call for k, v in (pieces[:2], pieces[2:]) for call in ((name, k), (name, v), 2.0)]
    assert calls == [7, *layers("put"), "sealed", *layers("get"), *layers("get"), "over"]
    of = {piece: kept[piece].data.tolist() for piece in pieces}
    disk.step(shelf, gpu, 8, pieces, rows, 8.0)
    marks = [*of.values(), *(kept[piece].data.tolist() for piece in pieces)]
    assert all(one != other for one, other in itertools.combinations(marks, 2))  # of each piece and step its own


def test_rows_have_the_size_that_was_asked_for_and_cannot_be_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Rows] = []
    monkeypatch.setattr(disk, "step", lambda shelf, gpu, number, pieces, rows, plain: seen.append(rows))
    disk.measure(Path(), TINY._replace(gib=2**-10), 1, disk.LEFT)
    assert seen[0].bytes_kept == 2**20 // 6 and seen[0].data.unique().numel() == 256


def test_the_first_step_is_not_in_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def host(seen: Any, seconds: float) -> str:
        counts.extend(event.count for event in seen.key_averages() if event.key == "kvlock::close_file")
        return ""

    monkeypatch.setattr(disk._profile, "host", host)
    disk.measure(tmp_path, TINY, 3, disk.LEFT)
    assert counts == [3 * 4]  # files of a step


def test_the_rate_of_a_disk_is_that_of_a_file_written_over_until_it_is_there(
    tmp_path: Path, begun: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PROBE", 2**23)
    clock = itertools.count()
    monkeypatch.setattr(disk, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with mock.patch.object(disk.os, "fsync") as fsync:
        assert disk.rate(tmp_path) == 2**23
    assert fsync.call_count == 2
    assert [call.args[1:] for call in begun.call_args_list] == 2 * [(0, 2**22), (2**22, 2**22)]


@pytest.mark.parametrize("name", ["triton", "matplotlib"])
def test_it_needs_nothing_of_a_gpu_and_draws_nothing(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import benchmarks.disk"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(disk.__file__).parents[1])


@pytest.mark.parametrize("writes", [disk.LEFT, disk.EARLY])
def test_what_is_left_to_the_system_is_not_begun_with(tmp_path: Path, begun: mock.Mock, writes: str) -> None:
    disk.measure(tmp_path, TINY, 1, writes)
    assert begun.call_count == (2 * 2 * TINY.layers if writes == disk.EARLY else 0)  # K and V, two steps


@pytest.mark.parametrize("step", [0, 1])
def test_rows_that_do_not_come_back_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    pieces, blank = [Piece(0, "blocks", 0, tensor) for tensor in "kv"], torch.zeros(1, 8, dtype=torch.uint8)
    with _clock.clocked() as gpu:
        shelf = shelf_of(Store(place="disk", folder=tmp_path))
        assert shelf is not None
        shelf.serve(torch.device("cuda"), [pieces[0].layer])
        for number in range(step):
            disk.step(shelf, gpu, number, pieces, Rows(blank.clone()), 0)
        monkeypatch.setattr(shelf, "get", lambda piece: Rows(blank))
        message = rf"0\.blocks\.0\.k of step {step} came back with \[\[0, 0\], \[0, 0\]\]; wanted "
        with pytest.raises(ValueError, match=message):
            disk.step(shelf, gpu, step, pieces, Rows(blank.clone()), 0)
        shelf.close()


@pytest.mark.parametrize("end", [0, -1])
def test_both_ends_of_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    real = Shelf.get

    def get(shelf: Shelf, piece: Piece) -> Rows:
        rows = real(shelf, piece)
        rows.data[0, end] = 0
        return rows

    monkeypatch.setattr(Shelf, "get", get)
    with pytest.raises(ValueError, match=r"0\.blocks\.0\.k of step 0 came back with "):
        disk.measure(tmp_path, TINY, 1, disk.EARLY)
    assert [*tmp_path.iterdir()] == []


def test_what_is_put_in_place_of_a_gpu_is_taken_away(tmp_path: Path) -> None:
    def found() -> list[object]:
        names = torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.stream, transit.copy, transit.room_for
        return [*names, write_back.background_bytes, torch.get_num_threads()]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = found()
        disk.main([str(tmp_path), "--steps", "1"])
        assert found() == before
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("options", "message"), [
    (["--steps", "0"], "argument --steps: found '0'; wanted a whole number above 0"),
    (["--steps", "1.5"], "argument --steps: found '1.5'; wanted a whole number above 0"),
    (["--gib", "-1"], "argument --gib: found '-1'; wanted a number above 0"),
    (["--gib", "nan"], "argument --gib: found 'nan'; wanted a number above 0"),
    (["--gib", "inf"], "argument --gib: found 'inf'; wanted a number above 0"),
    (["--gib", "1e9"], "GiB free; wanted 1000000000.00"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_a_disk_that_fills_up_is_an_error_with_the_name_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "measure", mock.Mock(side_effect=ValueError("cannot write k0: No space left on device")))
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path)])
    assert "error: cannot write k0: No space left on device" in capsys.readouterr().err


def test_rows_of_other_columns_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "rate", mock.Mock(side_effect=AssertionError))
    path = tmp_path / f"disk-{Machine(None, 'cpu').file}"
    path.write_text("other\n")
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path), "--out", str(tmp_path)])
    assert f"{path} has other columns" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_an_error_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path / "none")])
    assert f"error: cannot write to {tmp_path / 'none'}: No such file or directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path / "file")])
    assert f"error: cannot write to {tmp_path / 'file'}: Not a directory" in capsys.readouterr().err


def test_a_file_of_rows_that_cannot_be_written_is_an_error_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        disk.main([str(tmp_path), "--out", str(tmp_path / "file")])
    assert f"error: {tmp_path / 'file'}: File exists" in capsys.readouterr().err
    with mock.patch.object(disk.Results, "__exit__", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(SystemExit):
            disk.main([str(tmp_path), "--steps", "1", "--out", str(tmp_path)])
    assert f"error: {tmp_path}: No space left on device" in capsys.readouterr().err


def test_the_pace_is_that_of_the_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pace = disk.Pace.of("14b")
    assert (pace.layers, pace.gib) == (40, 19.47) and math.isclose(pace.locked, 1.5 * pace.plain)


def test_of_a_disk_that_was_measured_twice_the_last_row_counts(tmp_path: Path) -> None:
    about = {"writes": disk.EARLY, "disk_ratio": "2", "note": "a 3%, b 0%"}
    rows = [disk.row_of(TINY, [0.03, 0.03 * times])._replace(disk=name, **about)
            for name, times in (("one", 9.0), ("two", 1.0), ("one", 1.1))]  # fmt: skip
    path = tmp_path / "disk.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([disk.DiskRow._fields, *rows])
    lines = [line.split(" | ") for line in _disk_table.table(path).splitlines() if line.startswith(("| one", "| two"))]
    assert [(line[0], line[5], *line[7:]) for line in lines] == [
        ("| one", "1.10", "1.260", "1.22, missed", "a 3% |"), ("| two", "1.00", "1.200", "1.22, met", "a 3% |"),
    ]  # fmt: skip
    assert _disk_table.table(tmp_path / "none.csv") == "not yet measured"
