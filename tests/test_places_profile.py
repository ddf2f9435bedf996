"""A trace of the profiler names what the host does for rows outside the device, and what it waits for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from diffusers import WanPipeline
from recordings import edit
from simulated_gpu import GPU, LAYERS, put, served
from torch.profiler import ProfilerActivity, profile

from kvlock import Store
from kvlock.checksums import Verifier
from kvlock.step_file import digest
from kvlock.store import LAYERS_AT_ONCE

PIECES = 2 * LAYERS  # K and V


def ranges(seen: Any) -> dict[str, int]:
    """How often each range of this package is in a trace."""
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith("kvlock::")}


@pytest.mark.parametrize(("place", "names"), [
    ("host", {"kvlock::wait_for_copy": PIECES}),
    ("disk", {"kvlock::wait_for_copy": 2 * PIECES - 4, "kvlock::wait_for_write": PIECES, "kvlock::read_rows": PIECES,
              "kvlock::close_file": 2 * LAYERS_AT_ONCE}),
])  # fmt: skip
def test_waits_of_a_gpus_host_have_names(monkeypatch, tmp_path, place, names):
    gpu = GPU(monkeypatch, "the host")
    shelf, pieces = served(place, tmp_path)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        shelf.turn_to(0)
        put(gpu, shelf, dict.fromkeys(pieces, 0.0))
        for piece in pieces[:-2]:  # the last layer sends the first one for the next branch
            shelf.get(piece)
    shelf.close()
    assert ranges(seen) == names


def test_work_for_rows_of_a_cpu_has_a_name() -> None:
    pipe = tiny.pipeline(WanPipeline)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        _, trace = edit(pipe, store=Store(place="disk"))
    locked = sum(row["forwards"] == 3 for row in trace)
    rows, files = 2 * len(pipe.transformer.blocks), 2 * LAYERS_AT_ONCE
    assert ranges(seen) == {"kvlock::write_rows": locked * rows, "kvlock::close_file": locked * files}


def test_the_wait_for_a_checksum_has_a_name(tmp_path) -> None:
    (tmp_path / "step").write_bytes(b"rows")
    verifier = Verifier(tmp_path, tmp_path, {"step": {"sha256": digest(tmp_path / "step")}}, {})
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        verifier.require("step")
        verifier.require("step")  # right already: nothing to wait for
    verifier.stop()
    assert ranges(seen) == {"kvlock::wait_for_checksum": 1}
