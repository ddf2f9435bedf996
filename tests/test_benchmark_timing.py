"""What the harness of the benchmarks makes of a clock, of its input sets, of a GPU's state and of a wrong result."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import _harness, _machine
from benchmarks._case import TINY, Provider, close
from benchmarks._harness import Ceilings

CASE = dataclasses.replace(
    next(c for c in runner.CASES if (c.op, c.source, c.setting) == ("pack_kv", "bf16", "share 0.8")), shape=TINY
)


class Clock:
    """CUDA's events on a clock that only a call moves, by the milliseconds that it is said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.lead, self.host_took = 0.0, 0, -1

        class Event:
            def __init__(event, enable_timing: bool) -> None:
                event.at = 0.0

            def record(event) -> None:
                event.at = self.now

            def elapsed_time(event, end: "Event") -> float:
                return end.at - event.at

            def query(event) -> bool:
                return self.host_took > self.lead

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(self, "lead", cycles))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_percentiles_are_those_of_the_times_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), []
    monkeypatch.setattr(_harness, "REPEATS", (11, 11))
    monkeypatch.setattr(_harness, "WARM_UP_SECONDS", 0.0)

    def call(inputs: dict[str, int]) -> None:
        calls.append(inputs["set"])
        warm = len(calls) <= 3
        clock.now += 100.0 if warm else [5, 1, 9, 3, 7, 11, 2, 10, 4, 8, 6][len(calls) - 4]

    timing = _harness.measure(call, [{"set": i} for i in range(3)])
    assert timing == (3000, 6000, 9000, 0)  # microseconds; 1 to 11 ms in another order
    assert calls == [0, 1, 2] + [i % 3 for i in range(11)]


def test_times_are_many_within_half_a_second_and_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for milliseconds, wanted in ((1000.0, 20), (10.0, 50), (0.1, 200)):
        clock, calls = Clock(monkeypatch), []
        monkeypatch.setattr(_harness, "WARM_UP_SECONDS", 0.0)

        def call(inputs: dict, clock: Clock = clock, calls: list = calls, milliseconds: float = milliseconds) -> None:
            calls.append(inputs)
            clock.now += milliseconds

        _harness.measure(call, [{}])
        assert len(calls) == 1 + wanted


@pytest.mark.parametrize(
    ("took", "p50", "late"), [(10**5, 7000, 0), (2_000_000, 7000, 0), (10**9, 90_000, 1)], ids=["fast", "slow", "never"]
)
def test_what_the_host_was_late_to_queue_does_not_count(
    monkeypatch: pytest.MonkeyPatch, took: int, p50: float, late: float
) -> None:
    clock = Clock(monkeypatch)
    clock.host_took = took
    monkeypatch.setattr(_harness, "REPEATS", (20, 20))
    monkeypatch.setattr(_harness, "WARM_UP_SECONDS", 0.0)

    def call(inputs: dict) -> None:  # 7 ms, 90 where the GPU waits for the host
        clock.now += 7.0 if took <= clock.lead else 90.0

    timing = _harness.measure(call, [{}])
    assert (timing.p50, timing.p80, timing.late) == (p50, p50, late)


def test_a_row_of_the_hosts_times_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "measure", lambda *_: _harness.Timing(1.0, 2.0, 3.0, late=0.6))
    monkeypatch.setattr(_harness, "rotation", lambda *_: [])
    machine = SimpleNamespace(gpu="none", now=dict, memory=dict)
    (row,) = _harness.rows([CASE.by("eager")], machine, Ceilings(1.0), "cpu")
    assert (row.p20, row.p50, row.note) == ("1.00", "2.00", "host's times: it was late to queue 60% of the calls")


def test_a_row_says_what_the_gpu_was_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {("gpu 0", "sm"): 1980, ("gpu 0", "memory"): 2619}
    nvml = SimpleNamespace(
        NVML_CLOCK_SM="sm", NVML_CLOCK_MEM="memory", NVMLError=RuntimeError, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-some-uuid": "gpu 0"}.__getitem__,
        nvmlSystemGetDriverVersion=lambda: "580.1", nvmlDeviceGetClockInfo=lambda *which: clocks[which],
        nvmlDeviceGetPowerUsage={"gpu 0": 215_700}.__getitem__,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="some-uuid"))
    machine = _machine.Machine("abc")
    now = machine.now()
    assert (now["gpu"], now["commit"], now["torch"]) == ("NVIDIA H200", "abc", torch.__version__)
    state = {name: now[name] for name in ("driver", "sm_mhz", "memory_mhz", "power_w")}
    assert state == {"driver": "580.1", "sm_mhz": "1980", "memory_mhz": "2619", "power_w": "216"}

    def lost(gpu: str) -> int:
        raise RuntimeError("the GPU is lost")

    nvml.nvmlDeviceGetPowerUsage = lost
    now = machine.now()  # the others are asked all the same
    assert "power_w" not in now and (now["gpu"], now["driver"], now["sm_mhz"]) == ("NVIDIA H200", "580.1", "1980")


def test_the_errors_of_a_row_are_those_of_the_formula() -> None:
    exact = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    case = dataclasses.replace(
        CASE, make=lambda *_: {"x": exact}, check=lambda before, after: close(after, (before["x"],), 2),
        providers=(Provider("spoiled", lambda inputs: ((inputs["x"] + torch.tensor([0, 1, 0, 2.0])).float(),)),),
    )  # fmt: skip
    machine = SimpleNamespace(gpu="none", now=dict, memory=dict)
    (row,) = _harness.rows([case], machine, Ceilings(1.0), "cpu")
    assert (row.status, row.max_error, row.relative_error) == ("failed", "0.5", f"{5**0.5 / 5:.3g}")  # 2 / 4; 5 / 25
    assert row.note == "not timed: error 0.5, allowed 2.38e-07"


def test_the_core_has_forty_rows_or_so() -> None:
    rows = sum(len(case.short().providers) for case in runner.CASES if case.core)
    assert 36 <= rows <= 45
