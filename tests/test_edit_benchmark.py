"""The benchmark of whole edits, on the miniature and the CPU, where its times mean nothing."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kvlock
from benchmarks import _edit_rows, edit
from benchmarks._edit_rows import EditRow
from benchmarks._machine import Machine
from kvlock import Store, preset
from kvlock.cost import ModelSizes, estimate

KINDS = ("preset plain", "store, hooks", "store, fused", "store int8 on the host, hooks", "recording, hooks")


@pytest.fixture(scope="module")
def made() -> edit.Edit:
    """The edit of the benchmark on a corner of its video."""
    whole = edit.miniature("cpu")
    video = whole.arguments["video"][:, :5, :, :48, :48]
    mask = torch.zeros(5, 48, 48, dtype=torch.bool)
    mask[:, :16, :16] = True
    sizes = {"video": video, "mask": mask[None, :, None].float(), "height": 48, "width": 48, "num_frames": 5}
    return whole._replace(
        masks=kvlock.Masks.from_pixels(mask, whole.pipe), source=whole.source[:, :, :2, :6, :6],
        arguments=whole.arguments | sizes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(edit.ROUNDS, "cpu", 1)


def rows_of(printed: str) -> list[list[str]]:
    """The rows among what a run prints."""
    return [line for line in csv.reader(printed.splitlines()) if line[:1] == ["miniature"]]


def test_an_edit_is_measured_plain_and_locked(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(edit, "MODES", {name: edit.MODES[name]._replace(target=math.inf) for name in KINDS})
    monkeypatch.setattr(edit, "miniature", lambda device: made)
    assert edit.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.iterdir()
    written = [one.row for one in _edit_rows.latest(path)]
    assert path.name.startswith("edit-") and [[*row[: edit.MEASURED + 1]] for row in written] == rows_of(
        capsys.readouterr().out
    )
    rows = {row.mode: row for row in written}
    assert list(rows) == ["pipeline", *KINDS]
    assert all(row.gpu and row.torch and row.commit == "abc" and row.date for row in written)
    assert rows["preset plain"].difference == rows["recording, hooks"].difference == "0"  # bit for bit
    assert float(rows["store, fused"].difference) < 1e-3
    assert [row.forwards for row in written] == ["2", "2", "3", "3", "3", "2"]
    plain = float(rows["pipeline"].step_s)
    for row in written:
        assert 0 < int(row.background) < int(row.tokens)
        step = float(row.step_s)
        locked = float(row.locked_step_s or step)
        assert float(row.locked_ratio or locked / plain) == pytest.approx(locked / plain, rel=0.01)
        assert float(row.edit_ratio) == pytest.approx((0.6 * step + 0.4 * locked) / plain, rel=0.01)
    assert [row.mode for row in written if row.locked_step_s] == list(KINDS[1:])
    sizes = ModelSizes.of(made.pipe.transformer.config)
    wanted = {"tokens": made.masks.num_tokens, "background_rows": len(made.masks.index), "bytes_per_value": 4}
    config = preset("kv-lock", kappa=0.4)
    host = estimate(sizes, config, **wanted, store=Store("int8", place="host")).bytes_moved
    replayed = estimate(sizes, config, **wanted).bytes_moved_replay
    moved = [float(rows[mode].moved_gib) * 2**30 for mode in KINDS[1:]]
    assert moved == pytest.approx([0, 0, host, replayed], rel=1e-3)


def test_a_mode_that_misses_its_target_says_what_it_spends_its_time_on(made: edit.Edit) -> None:
    missed = {"preset plain": edit.MODES["preset plain"]._replace(target=0.0)}
    with torch.no_grad():
        _, row = edit.measure(made, "cpu", missed, Machine("abc", "cpu"))
    assert row.note.startswith("target 0.0; ") and "aten::" in row.note and "%" in row.note


def test_rounds_are_pooled(made: edit.Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow round changes no median."""
    rounds = [1.0, 9.0, 1.0]
    plain, modes = iter(rounds), iter(rounds)
    steps = lambda *seconds: edit.Steps([*seconds], torch.zeros(1), 0, 0, 0)
    monkeypatch.setitem(edit.ROUNDS, "cpu", len(rounds))
    monkeypatch.setattr(edit, "run", lambda *_: steps(*4 * [next(plain)]))
    lock = lambda factor: (steps(factor, 5.0, 2 * factor, 2 * factor), [{"forwards": 3, "source_bytes": 0}])
    monkeypatch.setattr(edit, "locked", lambda *_: lock(next(modes)))
    first, row = edit.measure(made, "cpu", {"store": edit.Mode(target=math.inf)}, Machine("abc", "cpu"))
    assert (float(first.step_s), float(row.step_s), float(row.locked_step_s)) == (1, 1, 2)
    assert (float(row.locked_ratio), float(row.edit_ratio)) == (2, 1.4)


def test_a_mode_that_fails_is_written_and_the_others_go_on(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    locked, written = edit.locked, []

    def failing(edit_: edit.Edit, device: str, mode: edit.Mode) -> Any:
        (path,) = tmp_path.iterdir()
        with path.open(newline="", encoding="utf-8") as file:
            written.append([row["mode"] for row in csv.DictReader(file)])
        if mode.kernel == "backend":
            raise torch.OutOfMemoryError("no room\nfor more")
        return locked(edit_, device, mode)

    names = ("store, backend", "preset plain")
    monkeypatch.setattr(edit, "locked", failing)
    monkeypatch.setattr(edit, "miniature", lambda device: made)
    monkeypatch.setattr(edit, "MODES", {name: edit.MODES[name]._replace(target=math.inf) for name in names})
    assert edit.main(["--out", str(tmp_path)]) == 1
    assert written == [["pipeline"], ["pipeline", "store, backend"]]  # each is there before the next one begins
    rows = {line[1]: EditRow(*line) for line in rows_of(capsys.readouterr().out)}
    assert rows["store, backend"].note == "failed: OutOfMemoryError: no room"
    assert rows["store, backend"].step_s == "" and rows["preset plain"].step_s


def test_a_mode_that_is_not_there_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit.main(["--only", "nosuchmode"])
    assert "no mode has 'nosuchmode' in its name; there are preset plain; store, hooks" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert edit.main(["--gpu", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "needs a CUDA GPU" in err
    assert list(tmp_path.iterdir()) == []
