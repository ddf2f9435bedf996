"""The script for a machine without a GPU, with another program in Python's place that says what it was asked."""

import shlex
import subprocess
from pathlib import Path

import pytest
from benchmark_readme import README

from benchmarks import _machine
from benchmarks.report import COMMANDS

SCRIPT = Path(__file__).parents[1] / ".ci" / "cpu"
PYTHON = """#!/bin/sh
[ "$1" != -c ] || { echo amd-epyc.csv; exit; }
echo "$@" >> "$0.asked"
[ "$2" != "$FAILING" ]
"""


def run(folder: Path, failing: str = "") -> tuple[int, list[str]]:
    """Its exit code, and what Python was asked to run."""
    python = folder / "python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "FAILING": failing}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, Path(f"{python}.asked").read_text(encoding="utf-8").splitlines()


def test_every_benchmark_of_a_cpu_runs_and_then_the_page_is_renewed(tmp_path: Path) -> None:
    code, asked = run(tmp_path)
    rows = [COMMANDS[name] for name in ("cpu", "miniature", "accuracy")]
    commands = [*rows, *(f"python -m benchmarks.{name}" for name in ("offline --write", "figures", "report --write"))]
    assert (code, asked) == (0, [f"-m {command.removeprefix('python -m ')}" for command in commands])


def test_what_comes_after_a_failure_does_not_run(tmp_path: Path) -> None:
    code, asked = run(tmp_path, failing="pytest")
    assert code == 1 and len(asked) == 1


def test_the_page_names_the_script_and_its_commands() -> None:
    (block,) = [block for block in README.split("```") if ".ci/gpu " in block]
    listed = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [".ci/cpu"] in listed and ["pytest", "benchmarks"] in listed
    for name in ("edit", "accuracy", "offline", "figures", "report"):
        assert any(words[:3] == ["python", "-m", f"benchmarks.{name}"] for words in listed)


def test_a_row_more_is_no_change_of_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, rows, beside = (tmp_path / name for name in ("benchmarks/a.py", "benchmarks/results/a.csv", "a.py"))
    rows.parent.mkdir(parents=True)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)
    for file in (program, rows, beside):
        file.write_text("1", encoding="utf-8")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(_machine, "__file__", str(program))
    commit = _machine.checkout()
    rows.write_text("2", encoding="utf-8")
    assert commit and _machine.checkout() == commit
    for file in (program, beside):
        file.write_text("2", encoding="utf-8")
        assert _machine.checkout() == f"{commit}+changes"
        file.write_text("1", encoding="utf-8")
