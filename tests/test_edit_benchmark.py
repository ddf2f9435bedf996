"""The benchmark of whole edits, on the miniature and the CPU, where its times mean nothing."""

import csv
import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import kvlock
from benchmarks import __main__ as runner
from benchmarks import _edit_rows, _edits, edit
from benchmarks._edit_rows import EditRow
from benchmarks._machine import Machine
from benchmarks._modes import USUAL, Mode
from kvlock import preset
from kvlock.cost import ModelSizes, estimate

LARGE = 2**28  # bytes


@pytest.fixture(scope="module", autouse=True)
def nothing_else() -> Iterator[None]:
    """What there is already is left out where the benchmark collects garbage before a run: going through it is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def made() -> edit.Edit:
    """The edit of the benchmark on a corner of its video."""
    whole = _edits.miniature("cpu")
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


@pytest.mark.smoke
def test_an_edit_is_measured_plain_and_locked(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(edit, "MODES", {name: mode._replace(target=math.inf) for name, mode in edit.MODES.items()})
    monkeypatch.setitem(edit.EDITS, "miniature", lambda device: made)
    assert edit.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.iterdir()
    written = [one.row for one in _edit_rows.latest(path)]
    assert path.name.startswith("edit-") and [[*row[: edit.MEASURED + 1]] for row in written] == rows_of(
        capsys.readouterr().out
    )
    rows = {row.mode: row for row in written}
    assert list(rows) == ["pipeline", *edit.MODES]
    assert all(row.gpu and row.torch and row.commit == "abc" and row.date for row in written)
    assert {row.diffusers for row in written} == {diffusers.__version__}
    as_given = ("preset plain", "store on the host, hooks", "store on disk, hooks", "recording, hooks")
    assert {rows[mode].difference for mode in as_given} == {"0"}  # bit for bit
    assert all(float(row.difference) < 0.05 for row in written if row.difference)
    forwards = {"pipeline": 2, "preset plain": 2, "batch, hooks": 4}
    assert all(int(row.forwards) == forwards.get(row.mode, 2 if "recording" in row.mode else 3) for row in written)
    plain = float(rows["pipeline"].step_s)
    for row in written:
        assert 0 < int(row.background) < int(row.tokens)
        step = float(row.step_s)
        locked = float(row.locked_step_s or step)
        assert float(row.locked_ratio or locked / plain) == pytest.approx(locked / plain, rel=0.01)
        assert float(row.edit_ratio) == pytest.approx((0.6 * step + 0.4 * locked) / plain, rel=0.01)
    assert [row.mode for row in written if not row.locked_step_s] == ["pipeline", "preset plain"]
    kept = [float(rows[mode].source_gib) for mode in ("store, hooks", "half the layers, hooks")]
    assert kept[1] == pytest.approx(kept[0] / 2, rel=1e-3)
    sizes, config = ModelSizes.of(made.pipe.transformer.config), preset("kv-lock", kappa=0.4)
    wanted = {"tokens": made.masks.num_tokens, "background_rows": len(made.masks.index), "bytes_per_value": 4}
    for name, mode in edit.MODES.items():
        cost = estimate(sizes, config, **wanted, store=mode.store)
        moved = cost.bytes_moved_replay if mode.recorded else cost.bytes_moved
        assert float(rows[name].moved_gib) * 2**30 == pytest.approx(moved, rel=1e-3)


def test_time_that_others_take_of_a_core_is_not_counted(made: edit.Edit) -> None:
    waits = iter([0.0] * 5 + [1.0])
    hook = made.pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(next(waits, 0.0)))
    with hook, torch.no_grad():
        seconds = edit.run(made, "cpu").seconds
    assert next(waits, None) is None and max(seconds) < 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not say")
def test_the_memory_of_a_run_is_its_own_and_not_what_others_have_left(made: edit.Edit) -> None:
    left: list[torch.Tensor] = []
    hold = lambda *_: left or left.append(torch.ones(LARGE, dtype=torch.uint8))
    with torch.no_grad():
        with made.pipe.transformer.register_forward_hook(lambda *_: hold() and None):
            first = edit.run(made, "cpu").host
        second = edit.run(made, "cpu").host
    assert first > LARGE > 2 * second > 0


def test_an_edit_on_a_cpu_has_one_thread_and_gives_the_others_back(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setitem(edit.EDITS, "miniature", lambda device: made)
    monkeypatch.setattr(edit, "measure", lambda *_: seen.append(torch.get_num_threads()) or [])
    torch.set_num_threads(before + 1)
    try:
        edit.main([])
        assert (seen, torch.get_num_threads()) == ([1], before + 1)
    finally:
        torch.set_num_threads(before)


def test_wan_is_built_in_any_size_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_edits.SHAPES, "tiny", {"num_attention_heads": 1, "ffn_dim": 16, "num_layers": 1})
    monkeypatch.setattr(_edits, "VIDEO", (5, 160, 208))
    made = _edits.wan("cpu", "tiny")
    assert made.model == "wan-tiny, random" and made.masks.num_tokens == 2 * 10 * 13
    assert made.pipe.transformer.dtype == made.embeds.dtype == torch.bfloat16
    with torch.no_grad():
        steps, trace = edit.locked(made, "cpu", Mode())
    assert steps.latents.shape == made.source.shape and steps.latents.isfinite().all()
    assert [row["forwards"] for row in trace] == [2, 2, 3, 3, 3]


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
    first, row = edit.measure(made, "cpu", {USUAL: Mode(target=math.inf)}, Machine("abc", "cpu"))
    assert (float(first.step_s), float(row.step_s), float(row.locked_step_s)) == (1, 1, 2)
    assert (float(row.first_locked_s), float(row.locked_ratio), float(row.edit_ratio)) == (5, 2, 1.4)
    assert (float(first.spread), float(row.spread)) == (9, 9)


def test_a_mode_that_fails_in_one_round_has_failed(made: edit.Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, rounds = edit.Steps([1.0] * 4, torch.zeros(1), 0, 0, 0), iter([False, True, True])
    monkeypatch.setitem(edit.ROUNDS, "cpu", 3)
    monkeypatch.setattr(edit, "run", lambda *_: steps)

    def locked(*_: Any) -> Any:
        if next(rounds):
            return steps, [{"forwards": 3, "source_bytes": 0}]
        raise ValueError("once")

    monkeypatch.setattr(edit, "locked", locked)
    _, row = edit.measure(made, "cpu", {USUAL: Mode()}, Machine("abc", "cpu"))
    assert (row.step_s, row.note) == ("", "failed: ValueError: once")
    assert [*rounds] == [True, True]  # once was enough


def test_what_others_are_compared_with_is_run_for_them_where_nobody_asked_for_it(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Mode] = []

    def locked(edit_: edit.Edit, device: str, mode: Mode) -> Any:
        ran.append(mode)
        steps = edit.Steps([1.0] * 4, torch.full((1,), float(mode.kernel != "hooks")), 0, 0, 0)
        return steps, [{"forwards": 3, "source_bytes": 0}]

    monkeypatch.setattr(edit, "run", lambda *_: edit.Steps([1.0] * 4, torch.zeros(1), 0, 0, 0))
    monkeypatch.setattr(edit, "locked", locked)
    names = ("preset plain", "store, backend, full", "store, fused", "batch, hooks")
    _, *rows = edit.measure(made, "cpu", {name: edit.MODES[name] for name in names}, Machine("abc", "cpu"))
    assert [row.difference for row in rows] == ["0", "", "1", "0"]
    assert ran == [edit.MODES[name] for name in (USUAL, *names)]


@pytest.mark.parametrize("asked", [True, False])
def test_where_hooks_fail_the_others_are_measured_and_compared_with_nothing(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    steps = edit.Steps([1.0] * 4, torch.zeros(1), 0, 0, 0)

    def locked(edit_: edit.Edit, device: str, mode: Mode) -> Any:
        if mode == Mode():
            raise torch.OutOfMemoryError("no room")
        return steps, [{"forwards": 3, "source_bytes": 0}]

    monkeypatch.setattr(edit, "run", lambda *_: steps)
    monkeypatch.setattr(edit, "locked", locked)
    names = (USUAL, "store int8, hooks")[not asked :]
    rows = [*edit.measure(made, "cpu", {name: edit.MODES[name] for name in names}, Machine("abc", "cpu"))]
    assert (rows[-1].mode, rows[-1].step_s, rows[-1].difference) == ("store int8, hooks", "1.0000", "")
    assert rows[-1].note == "" and (not asked or rows[1].note == "failed: OutOfMemoryError: no room")


def test_a_mode_that_fails_is_written_and_the_others_go_on(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    locked, written = edit.locked, []

    def failing(edit_: edit.Edit, device: str, mode: Mode) -> Any:
        (path,) = tmp_path.iterdir()
        with path.open(newline="", encoding="utf-8") as file:
            written.append([row["mode"] for row in csv.DictReader(file)])
        if mode.kernel == "backend":
            raise torch.OutOfMemoryError("no room\nfor more")
        return locked(edit_, device, mode)

    names = (USUAL, "store, backend", "preset plain")
    monkeypatch.setattr(edit, "locked", failing)
    monkeypatch.setitem(edit.EDITS, "miniature", lambda device: made)
    monkeypatch.setattr(edit, "MODES", {name: edit.MODES[name]._replace(target=math.inf) for name in names})
    assert edit.main(["--out", str(tmp_path)]) == 1
    names = ["pipeline", *names]
    assert written == [names[:count] for count in (1, 2, 3)]  # each is there before the next one begins
    rows = {line[1]: EditRow(*line) for line in rows_of(capsys.readouterr().out)}
    assert rows["store, backend"].note == "failed: OutOfMemoryError: no room"
    assert rows["store, backend"].step_s == "" and rows["preset plain"].step_s


def test_a_mode_that_is_not_there_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit.main(["--only", "nosuchmode"])
    assert "no mode has 'nosuchmode' in its name; there are preset plain; store, hooks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "memory", "built"),
    [
        ([], 85e9, ["miniature", "1.3b", "14b"]),
        ([], 24e9, ["miniature", "1.3b"]),
        (["--shape", "1.3b"], 24e9, ["1.3b"]),
        (["--shape", "14b"], 24e9, []),
    ],
)
def test_a_gpu_edits_with_every_shape_that_it_has_room_for_and_says_which_it_has_not(
    words: list[str], memory: float, built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    for shape in edit.EDITS:
        monkeypatch.setitem(edit.EDITS, shape, lambda device, shape=shape: made.append(shape) or shape)
    measured = lambda shape, device, *_: [EditRow(shape, "pipeline", device, *["1"] * (edit.MEASURED - 3))]
    machine = SimpleNamespace(now=lambda: {"gpu": "small"}, file="small.csv")
    monkeypatch.setattr(edit, "lacking", str)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory, 85e9))
    monkeypatch.setattr(edit, "Machine", lambda *_: machine)
    monkeypatch.setattr(edit, "measure", measured)
    assert edit.main(["--gpu", *words, "--out", str(tmp_path)]) == 0
    with (tmp_path / "edit-small.csv").open(newline="", encoding="utf-8") as file:
        rows = [EditRow(**line) for line in csv.DictReader(file)]
    assert made == built and [row.model for row in rows if row.dtype == "cuda"] == built
    (*_, last) = rows
    if memory < 60e9 and "1.3b" not in words:
        assert (last.model, last.mode, last.step_s, last.gpu) == ("wan-14b, random", "pipeline", "", "small")
        assert last.note == "not run: it needs about 60 GB of device memory; 24 are free"


def test_a_model_that_finds_no_room_is_a_row_and_the_next_one_is_measured(
    made: edit.Edit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> Any:
        raise torch.OutOfMemoryError("of 70 GiB\n")

    monkeypatch.setitem(edit.EDITS, "1.3b", no_room)
    monkeypatch.setitem(edit.EDITS, "miniature", lambda device: made)
    machine = Machine("abc", "cpu")
    steps = edit.Steps([1.0] * 4, torch.zeros(1), 0, 0, 0)
    monkeypatch.setattr(edit, "run", lambda *_: steps)
    first, second = edit.one_after_the_other(["1.3b", "miniature"], "cpu", {}, machine)
    assert (first.model, first.note) == ("wan-1.3b, random", "failed: OutOfMemoryError: of 70 GiB")
    assert (second.model, second.step_s) == ("miniature", "1.0000") and first.date


def test_a_cpu_is_not_asked_for_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit.main(["--shape", "14b"])
    assert "--shape 14b wants --gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nvml", "said"),
    [(None, 'needs nvidia-ml-py, for the clocks, the power and the memory of each row: pip install -e ".[bench]"\n'),
     (SimpleNamespace(), "needs NVML, for the clocks, the power and the memory of each row: no driver\n")],
)  # fmt: skip
def test_without_nvml_the_run_ends_with_one_line(
    nvml: Any, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", nvml and SimpleNamespace(nvmlInit=fails))
    for main in (edit.main, runner.main):
        assert main(["--gpu", "--out", str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.endswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert edit.main(["--gpu", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "needs a CUDA GPU" in err
    assert list(tmp_path.iterdir()) == []
