"""What a row says that its steps spent their time on."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from benchmarks import _profile

CPU, CUDA = DeviceType.CPU, DeviceType.CUDA


def event(key: str, on: DeviceType, spent: float, *, annotation: bool = False) -> SimpleNamespace:
    """What a trace has of a name, for so many seconds."""
    host, device = (1e6 * spent, 5e5) if on is CPU else (0, 1e6 * spent)  # operators have their kernels' time too
    return SimpleNamespace(
        key=key, device_type=on, is_user_annotation=annotation, self_device_time_total=device, cpu_time_total=host
    )


def trace(*events: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(key_averages=lambda: events)


def test_a_gpus_kernels_are_counted_once_and_its_host_by_names_of_this_package() -> None:
    seen = trace(
        event("attention", CUDA, 6), event("aten::linear", CPU, 1), event("product", CUDA, 2),
        event("kvlock::wait_for_write", CPU, 1.5), event("kvlock::read_rows", CPU, 4),
        event("kvlock::read_rows", CUDA, 3, annotation=True), event("kvlock::read_rows kernel", CUDA, 0),
    )  # fmt: skip
    said = "GPU work of 80% of the time: attention 75%, product 25%, kvlock::read_rows kernel 0%"
    assert _profile.summary(seen, "cuda", 10) == f"{said}; the host: read_rows 40%, wait_for_write 15%"
    assert _profile.summary(trace(event("attention", CUDA, 6)), "cuda:0", 10).endswith("attention 100%")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_empty_trace_has_no_shares(device: str) -> None:
    assert "%" not in _profile.summary(trace(), device, 1).replace("GPU work of 0%", "")


def test_the_host_is_traced_on_a_cpu_and_beside_a_gpu() -> None:
    with profile(activities=_profile.activities("cpu")) as seen:
        with record_function("kvlock::wait_for_write"):
            time.sleep(0.05)
        torch.ones(2) + 1
    assert _profile.summary(seen, "cpu", 1).startswith("kvlock::wait_for_write ")
    assert "; the host: wait_for_write " in _profile.summary(seen, "cuda", 0.1)
    assert [each.name for each in _profile.activities("cuda")] == ["CPU", "CUDA"]
