"""A run on a GPU that goes on where another one stopped."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_readme import H100

from benchmarks import __main__ as runner
from benchmarks import attention, figures, plain_attention
from benchmarks._harness import Ceilings, Row, read

SHAPES = ("small-h12", "wan-1.3b-480p")
ATTENTION = ("attention", "kv_lerp_attention_")
CASES = [case for case in runner.CASES
         if case.op == "lock_schedule" or (case.shape.name in SHAPES and case.op in ATTENTION)]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose every row takes a minute; gives the names of its rows."""
    copy, clock = read(H100)[0]._replace(relative_error="0.001", over_plain="1"), SimpleNamespace(now=0.0)

    def rows(cases: Any, machine: Any, ceilings: Ceilings) -> Iterator[Row]:
        for case in cases:
            for provider in case.providers:
                clock.now += 60
                yield copy._replace(op=case.op, provider=provider.name, shape=case.shape.name, source=case.source,
                                    setting=case.setting, **changed.get(provider.name, {}))  # fmt: skip

    changed: dict[str, dict[str, str]] = {}
    drawn: list[Path] = []
    monkeypatch.setattr(runner, "Machine", lambda commit: SimpleNamespace(file="gpu.csv"))
    monkeypatch.setattr(runner, "copy_row", lambda machine: (copy, 3e12))
    monkeypatch.setattr(runner, "matmul_row", lambda machine: (copy._replace(op="matmul"), 7e14))
    monkeypatch.setattr(runner, "rows", rows)
    monkeypatch.setattr(figures, "draw", drawn.append)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock.now)

    def once(minutes: float = 1e9, **rows: dict[str, str]) -> list[tuple[str, str, str]]:
        before = len(read(tmp_path / "gpu.csv")) if (tmp_path / "gpu.csv").exists() else 0
        changed.clear()
        changed.update(rows)
        runner.measure(CASES, tmp_path, None, new=True, minutes=minutes)
        assert drawn.pop() == tmp_path / "gpu.csv"
        return [(row.op, row.provider, row.shape) for row in read(tmp_path / "gpu.csv")[before + 2 :]]

    return once


def every() -> list[tuple[str, str, str]]:
    return [(case.op, provider.name, case.shape.name) for case in CASES for provider in case.providers]


def test_what_has_a_row_is_not_measured_again(run: Any) -> None:
    assert run() == every()
    assert run() == []


def test_after_its_minutes_a_run_stops_and_the_next_one_goes_on(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(minutes=4.5)
    assert first == every()[:5] and "stopped after 4.5 minutes; --new goes on" in capsys.readouterr().out
    assert {*first, *run()} == {*every()}


@pytest.mark.parametrize(
    "bad",
    [{"p80": "9999"}, {"relative_error": ""}, {"over_plain": ""}, {"status": "failed"}, {"status": "error"}],
    ids=["spread", "of-an-earlier-version", "without-plain-attention", "failed", "error"],
)
def test_a_row_that_does_not_do_is_measured_again_beside_plain_attention(run: Any, bad: dict[str, str]) -> None:
    run(**{"one launch": bad})
    again = run()
    locked = {row for row in again if row[0] == "kv_lerp_attention_"}
    assert locked == {("kv_lerp_attention_", "one launch", shape) for shape in SHAPES}
    plain = {("attention", name, shape) for name in ("one launch, no rows", "SDPA cuDNN") for shape in SHAPES}
    assert {*again} - locked == plain


@pytest.mark.parametrize("status", ["ok", "failed", "error"])
def test_a_row_without_a_time_makes_the_run_an_error(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    monkeypatch.setattr(runner, "lacking", str)
    monkeypatch.setattr(attention, "attends", lambda case: plain_attention.PLAIN[1])
    run(**{"one launch": {"status": status}})
    capsys.readouterr()
    code = runner.main(["--gpu", "--only", "small-h12", "--by", "one launch", "--out", str(tmp_path / "other")])
    said = capsys.readouterr().err
    assert (code, "rows have no time" in said) == ((0, False) if status == "ok" else (1, True))


@pytest.mark.parametrize("new", [False, True])
def test_plain_attention_is_measured_first_where_only_what_is_over_it_was_asked_for(
    run: Any, tmp_path: Path, new: bool
) -> None:
    shape, names = SHAPES[1], ("SDPA cuDNN", "kvlock sm_90")
    asked = [case.by("kvlock") for case in CASES if case.op == "kv_lerp_attention_" and case.shape.name == shape]
    runner.measure(runner.with_plain(asked), tmp_path, None, new=new)
    rows = [(row.op, row.provider, row.shape) for row in read(tmp_path / "gpu.csv")[2:]]
    plain, locked = [("attention", name, shape) for name in names], [("kv_lerp_attention_", "kvlock", shape)]
    assert rows == plain + len(asked) * locked


def test_the_operator_is_set_against_what_attends_on_the_gpu_that_is_there(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "lacking", str)
    monkeypatch.setattr(attention, "attends", lambda case: plain_attention.PLAIN[1])
    over = []
    rows = runner.rows

    def seen(cases: Any, *more: Any) -> Iterator[Row]:
        over.extend((p.name, p.over) for case in cases for p in case.providers if p.over)
        return rows(cases, *more)

    monkeypatch.setattr(runner, "rows", seen)
    asked = ["--gpu", "--only", "kv_lerp_attention_-H12-int8 wan-1.3b-480p", "--by", "kv", "--out", str(tmp_path)]
    assert runner.main(asked) == 0
    assert {*over} == {("kvlock", "SDPA FLASH"), ("kv_lerp_pair_ + cuDNN", "SDPA cuDNN")}
    first = [row.provider for row in read(tmp_path / "gpu.csv")[2:]]
    assert first[:2] == ["SDPA cuDNN", "SDPA FLASH"] and {*first[2:]} == {"kvlock", "kv_lerp_pair_ + cuDNN"}
