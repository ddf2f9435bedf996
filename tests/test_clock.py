"""The clock that stands in for a GPU in a benchmark of the host."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import _clock
from kvlock import transit
from kvlock.store import Rows


def test_a_gpu_of_the_clock_computes_while_the_host_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(_clock, "time", SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda seconds: setattr(clock, "now", clock.now + seconds)
    ))  # fmt: skip
    computing, copies = _clock.Stream(), _clock.Stream()
    computing.computes(2)
    first = computing.record_event()
    computing.computes(2)
    assert clock.now == 1
    copies.wait_event(first)
    copies.synchronize()  # no longer than the first layer takes
    assert clock.now == 3
    clock.now = 9  # the host is late, and the device has been idle
    computing.computes(2)
    copies.wait_stream(computing)
    copies.record_event().synchronize()
    first.synchronize()
    assert clock.now == 11


def test_memory_that_nobody_has_any_more_is_given_again() -> None:
    memory = _clock.Memory()
    one, two = (memory.empty_like(torch.zeros(3)) for _ in range(2))
    addresses = one.data_ptr(), two.data_ptr()
    assert addresses[0] != addresses[1]
    del one
    assert memory.empty_like(torch.zeros(4)).data_ptr() not in addresses
    assert memory.empty_like(torch.zeros(3)).data_ptr() == addresses[0]


def test_only_the_ends_of_what_a_gpu_copies_itself_arrive() -> None:
    source = Rows(torch.arange(8, dtype=torch.uint8)[None])
    with _clock.clocked():
        for non_blocking, wanted in ((True, [0, 1, 9, 9, 9, 9, 6, 7]), (False, [*range(8)])):
            room = Rows(torch.full((1, 8), 9, dtype=torch.uint8))
            transit.copy(source, room, non_blocking=non_blocking)
            assert room.data[0].tolist() == wanted
