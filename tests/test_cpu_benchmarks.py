"""The benchmarks of a CPU: each runs once at a tiny shape, and `pytest` alone times nothing."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest
from benchmarks import test_cpu as cpu
from benchmarks._harness import Ceilings, read

ROOT = Path(__file__).parents[1]


@pytest.mark.smoke
def test_each_benchmark_runs_once_at_a_tiny_shape_and_keeps_no_row(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    only = ["--benchmark-disable", "-k", "not compile", "--csv", str(path)]  # compiling takes minutes
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "benchmarks", *only], cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert passed and int(passed[1]) == sum(not provider.compiled for case in cpu.ON_CPU for provider in case.providers)
    assert read(path) == []


def test_rows_that_were_kept_are_said_and_written_with_the_machine(tmp_path: Path) -> None:
    path, said = tmp_path / "cpu.csv", []
    config = SimpleNamespace(stash={}, getoption={"--csv": path}.__getitem__)
    conftest.pytest_configure(config)
    case = next(case for case in cpu.ON_CPU if (case.op, case.source) == ("pack_kv", "bf16"))
    row = cpu.measured(case, case.providers[0], [0.001, 0.002, 0.003], Ceilings(40e9), [])
    config.stash[conftest.ROWS].append(row)
    conftest.pytest_terminal_summary(SimpleNamespace(write_line=said.append), config)
    (written,) = read(path)
    assert written.gpu.endswith(", one core") and written.torch == torch.__version__ and written.date
    assert written._replace(gpu="", torch="", commit="", date="") == row
    assert len(said) == 1 and f"{row.rate} GB/s, {row.share_of_copy} of memcpy" in said[0]


@pytest.mark.parametrize(("share", "said"), [("0.500", "met"), ("0.499", "missed")])
def test_a_target_is_said_to_be_met_or_missed(share: str, said: str) -> None:
    case = next(case for case in cpu.ON_CPU if (case.op, case.source) == ("pack_kv", "bf16"))
    row = cpu.measured(case, case.providers[0], [0.002], Ceilings(40e9), [])._replace(share_of_copy=share)
    assert conftest.against_target(row) == f", target 0.5: {said}"
    others = row._replace(provider="eager"), row._replace(op="unpack_kv")
    assert [conftest.against_target(other) for other in others] == ["", ""]


def test_a_rate_is_bytes_over_the_median_and_its_share_that_of_the_copy() -> None:
    case = next(case for case in cpu.ON_CPU if (case.op, case.source) == ("pack_kv", "bf16"))
    row = cpu.measured(case, case.providers[0], [0.001, 0.002, 0.003], Ceilings(40e9), [])
    assert float(row.p50) == pytest.approx(2000)
    assert float(row.rate) == pytest.approx(case.work(case.shape).amount / 0.002 / 1e9, rel=1e-3)
    assert float(row.share_of_copy) == pytest.approx(float(row.rate) / 40, abs=1e-3)


def test_locked_attention_is_set_against_the_product_and_against_plain_attention_of_the_same_run() -> None:
    plain, locked = (next(case for case in cpu.ON_CPU if case.op == op) for op in ("attention", "kv_lerp_attention_"))
    assert [provider.name for provider in plain.providers] == ["SDPA"] and len(locked.providers) == 3
    reached, flop = Ceilings(float("nan"), 60e9), 4 * 512**2 * 12 * 128
    kept = [cpu.measured(plain, plain.providers[0], [0.03], reached, [])]
    assert (kept[0].over_plain, kept[0].share_of_copy) == ("", "")
    for provider in locked.providers:
        row = cpu.measured(locked, provider, [0.04], reached, kept)
        assert float(row.over_plain) == pytest.approx(4 / 3, abs=1e-4)
        assert float(row.share_of_matmul) == pytest.approx(flop / 0.04 / 60e9, abs=1e-3)
        assert cpu.measured(locked, provider, [0.04], reached, []).over_plain == ""


def test_what_a_core_reaches_is_bytes_or_flop_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate(itertools.cycle([0.0, 0.002]))
    monkeypatch.setattr(conftest.time, "process_time", lambda: next(ticks))
    assert conftest.matmul() == pytest.approx(2 * 512**3 / 0.002)
    assert conftest.memcpy() == pytest.approx(2 * 2**25 / 0.002)


def test_plain_pytest_times_nothing(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
