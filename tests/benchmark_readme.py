"""The page of the benchmarks as tests read it: its tables and its sentences."""

import itertools
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """The cells of the Markdown table whose header begins with `first`."""
    lines = README.split(f"| {first} |", 1)[1].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows]


def table_of(name: str) -> list[list[str]]:
    """The cells of a block of the report."""
    lines = [line for line in report.BLOCKS[name]().splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def text(*wanted: str) -> None:
    """Wants each in the README, wherever its lines break."""
    flat = " ".join(README.split())
    assert [each for each in wanted if each not in flat] == []
