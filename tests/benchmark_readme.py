"""The page of the benchmarks as tests read it, its tables and its sentences, and the rows that it speaks of."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _gpu_tables, report
from benchmarks._harness import Row, is_steady, read
from benchmarks.lerp import is_usual

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
H100 = RESULTS / "nvidia-h100-80gb-hbm3.csv"
ROWS = read(report.H200)
EARLIER = read(H100)
SHAPES = {tokens: shape.name for tokens, shape in _gpu_tables.lengths(heads=12).items()}


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


def row(op: str, provider: str, shape: str, source: str = "", rows: Sequence[Row] = ROWS) -> Row | None:
    """The last steady one that was measured at the usual setting, on the H200 where nothing else is said."""
    wanted = op, provider, shape, source, "ok"
    found = (r for r in reversed(rows) if (r.op, r.provider, r.shape, r.source, r.status) == wanted)
    return next((r for r in found if r.setting != "without the lock" and is_usual(r.setting) and is_steady(r)), None)
