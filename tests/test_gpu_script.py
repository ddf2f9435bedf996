"""The script for a machine with a GPU, with another program in Python's place that says what it was asked."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu"
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
        ["bash", str(SCRIPT), *parts], env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    asked = folder / "python.asked"
    return done.returncode, done.stderr, asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []


@pytest.mark.parametrize(
    ("part", "command"),
    [
        ("tests", "-m pytest -m gpu and not slow -n auto --dist worksteal"),
        ("times", "-m benchmarks --gpu --core"),
        ("full", "-m benchmarks --gpu"),
    ],
)
def test_a_part_runs_its_command(tmp_path: Path, part: str, command: str) -> None:
    code, said, asked = run(tmp_path, part)
    assert (code, said, asked[-1]) == (0, "", command)


@pytest.mark.parametrize("failing", ["none", "benchmarks.edit"])
def test_edits_are_drawn_whether_or_not_a_mode_failed(tmp_path: Path, failing: str) -> None:
    code, _, asked = run(tmp_path, "edits", failing=failing)
    assert asked[-2:] == ["-m benchmarks.edit --gpu --out benchmarks/results", "-m benchmarks.figures"]
    assert code == (failing != "none")


@pytest.mark.parametrize("part", ["times", "full", "edits"])
def test_rows_without_clocks_and_power_are_refused_before_anything_runs(tmp_path: Path, part: str) -> None:
    code, said, asked = run(tmp_path, "tests", part, missing=1)
    assert code == 2 and 'pip install -e ".[bench]"' in said and not any("pytest" in line for line in asked)


def test_a_part_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "tests", "nosuch")
    assert (code, asked) == (2, []) and "nosuch is no part of this" in said
