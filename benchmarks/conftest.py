"""Beside pytest-benchmark: the rates of a copy and of a product in the same run, and rows as a GPU has them."""

import ctypes
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._case import Products, Traffic
from benchmarks._harness import Ceilings, Results, Row
from benchmarks._machine import checkout, processor
from benchmarks.packing import CPU_TARGETS

COPY_BYTES = 2**25
MATMUL_SIDE = 512
CALLS = 20
MACHINE = pytest.StashKey[dict[str, str]]()
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", type=Path, metavar="FILE", help="append the rows to a file of results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"torch": torch.__version__, "commit": checkout(), "date": date}  # of what has been imported, not later
    config.stash[MACHINE] = {"gpu": f"{processor()}, one core"} | versions


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Of all that is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rate(work: float, call: Callable[[], object]) -> float:
    """Of `work` a second, on one core: the median of some calls."""

    def seconds() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return work / statistics.median(seconds() for _ in range(CALLS))


def memcpy() -> float:
    """The bytes a second of the C library's copy, read and written; 32 MiB."""
    source, target = (torch.full((COPY_BYTES,), fill, dtype=torch.uint8) for fill in (1, 2))
    return rate(2 * COPY_BYTES, lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), COPY_BYTES))


def matmul() -> float:
    """The FLOP a second of a product of fp32 matrices; of bf16 ones it is slower where a core has nothing for them."""
    left, right = torch.ones(2, MATMUL_SIDE, MATMUL_SIDE)
    return rate(2.0 * MATMUL_SIDE**3, lambda: left @ right)


@pytest.fixture
def ceilings() -> Callable[[Traffic | Products], Ceilings]:
    """What bounds this work, to be measured right before its row."""
    return lambda work: Ceilings(memcpy()) if isinstance(work, Traffic) else Ceilings(math.nan, matmul())


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> list[Row]:
    """Takes rows; the columns of the machine and its versions are filled in at the end."""
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for row in rows:
        name = " ".join(filter(None, (row.op, row.source, row.setting, row.provider)))
        share = f", {row.share_of_copy} of memcpy" if row.share_of_copy else ""
        share = f", {row.share_of_matmul} of matmul" if row.share_of_matmul else share
        served = f" ({row.library})" if row.library else ""
        terminalreporter.write_line(f"{name}{served}: {row.rate} {row.rate_unit}{share}{against_target(row)}")
    if path := config.getoption("--csv"):
        with Results(path) as results:
            for row in rows:
                results.write(row._replace(**config.stash[MACHINE]))


def against_target(row: Row) -> str:
    """Whether a row of this package meets the target of its operator, where there is one."""
    target = CPU_TARGETS.get((row.op, row.source))
    if target is None or row.provider != "kvlock":
        return ""
    return f", target {target:g}: {'met' if float(row.share_of_copy) >= target else 'missed'}"
