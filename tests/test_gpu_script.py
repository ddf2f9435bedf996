"""The script for a machine with a GPU, with another program in Python's place that says what it was asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu"
PATH = "/usr/bin:/bin"
TABLES = "-m benchmarks.report --write"
PYTHON = """#!/bin/sh
echo "$@" >> "$0.asked"
[ "$2" != "import pynvml" ] || exit {missing}
[ "$2" != "{failing}" ] || exit 1
[ "$2" != kvlock_kernels.info ] || echo "cuda:0  extension: it has code for this GPU"
"""


def run(folder: Path, *parts: str, missing: int = 0, failing: str = "none") -> tuple[int, str, list[str]]:
    """Its exit code, what it said of an error, and what Python was asked."""
    python = folder / "python"
    python.write_text(PYTHON.format(missing=missing, failing=failing), encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), *parts], env={"PATH": PATH, "PYTHON": str(python)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    asked = folder / "python.asked"
    return done.returncode, done.stderr, asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []


@pytest.mark.parametrize(
    ("part", "commands"),
    [
        ("tests", ["-m pytest -m gpu and not slow -n auto --dist worksteal"]),
        ("times", ["-m benchmarks --gpu --core", TABLES]),
        ("full", ["-m benchmarks --gpu", TABLES]),
        ("new", ["-m benchmarks --gpu --new --minutes 10", TABLES]),
    ],
)
def test_a_part_runs_its_commands(tmp_path: Path, part: str, commands: list[str]) -> None:
    code, said, asked = run(tmp_path, part)
    assert (code, said, asked[-len(commands) :]) == (0, "", commands)


@pytest.mark.parametrize("part", ["times", "full", "new"])
def test_tables_are_made_and_an_error_returned_where_a_row_failed(tmp_path: Path, part: str) -> None:
    code, _, asked = run(tmp_path, part, failing="benchmarks")
    assert (code, asked[-1]) == (1, TABLES)


@pytest.mark.parametrize("failing", ["none", "benchmarks.edit"])
def test_edits_are_drawn_whether_or_not_a_mode_failed(tmp_path: Path, failing: str) -> None:
    code, _, asked = run(tmp_path, "edits", failing=failing)
    assert asked[-3:] == ["-m benchmarks.edit --gpu --out benchmarks/results", "-m benchmarks.figures", TABLES]
    assert code == (failing != "none")


@pytest.mark.parametrize("part", ["times", "full", "new", "edits"])
def test_rows_without_clocks_and_power_are_refused_before_anything_runs(tmp_path: Path, part: str) -> None:
    code, said, asked = run(tmp_path, "tests", part, missing=1)
    assert code == 2 and 'pip install -e ".[bench]"' in said and not any("pytest" in line for line in asked)


@pytest.mark.skipif(shutil.which("compute-sanitizer", path=PATH) is not None, reason="the program is there")
def test_memory_without_its_program_is_refused_before_anything_runs(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "tests", "memory")
    assert (code, asked) == (2, []) and "compute-sanitizer" in said


def test_a_part_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "tests", "nosuch")
    assert (code, asked) == (2, []) and "nosuch is no part of this" in said
