"""Beside pytest-benchmark: the rate of a copy in the same run, and rows of results as a GPU has them."""

import ctypes
import datetime
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._harness import Results, Row
from benchmarks._machine import checkout, processor
from benchmarks.packing import CPU_TARGETS

COPY_BYTES = 2**25
COPIES = 20
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


@pytest.fixture
def memcpy() -> float:
    """The bytes a second of the C library's copy on one core right before the row, read and written; 32 MiB."""
    source, target = (torch.full((COPY_BYTES,), fill, dtype=torch.uint8) for fill in (1, 2))

    def seconds() -> float:
        start = time.process_time()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), COPY_BYTES)
        return time.process_time() - start

    return 2 * COPY_BYTES / statistics.median(seconds() for _ in range(COPIES))


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Any:
    """Takes a row; the columns of the machine and its versions are filled in at the end."""
    return request.config.stash[ROWS].append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for row in rows:
        name = " ".join(filter(None, (row.op, row.source, row.setting, row.provider)))
        share = f", {row.share_of_copy} of memcpy" if row.share_of_copy else ""
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
