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
from benchmarks._machine import checkout

COPY_BYTES = 2**25
COPIES = 30
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", type=Path, metavar="FILE", help="append the rows to a file of results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Of all that is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def memcpy() -> float:
    """The bytes a second of the C library's copy on one core, read and written; 32 MiB, which few caches hold."""
    source, target = (torch.full((COPY_BYTES,), fill, dtype=torch.uint8) for fill in (1, 2))

    def seconds() -> float:
        start = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), COPY_BYTES)
        return time.perf_counter() - start

    return 2 * COPY_BYTES / statistics.median(seconds() for _ in range(COPIES))


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Any:
    """Takes a row; what is blank of machine and versions is filled in."""
    return request.config.stash[ROWS].append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    for row in rows:
        name = " ".join(filter(None, (row.op, row.source, row.setting, row.provider)))
        terminalreporter.write_line(f"{name} ({row.library}): {row.rate} GB/s, {row.share_of_copy} of memcpy")
    if path := config.getoption("--csv"):
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        versions = {"gpu": f"{processor()}, one core", "torch": torch.__version__, "commit": checkout(), "date": date}
        with Results(path) as results:
            for row in rows:
                results.write(row._replace(**versions))


def processor() -> str:
    """The processor's name for itself, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
