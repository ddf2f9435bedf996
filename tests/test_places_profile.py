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

OURS = "kvlock::"
PIECES, FILES = 2 * LAYERS, 2 * LAYERS_AT_ONCE  # K and V


def ranges(seen: Any) -> dict[str, int]:
    """How often each range of this package is in a trace."""
    events = [event for event in seen.key_averages() if event.key.startswith(OURS)]
    return {event.key.removeprefix(OURS): event.count for event in events}


@pytest.mark.parametrize(("place", "names"), [
    ("host", {"wait_for_copy": PIECES, "pin_memory": PIECES}),
    # The source's rows wait for their copies to memory; those of all but the first two layers for room in what brings
    # them back.
    ("disk", {"wait_for_copy": PIECES + PIECES - 4, "wait_for_write": PIECES, "read_rows": PIECES,
              "close_file": FILES}),
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


@pytest.mark.parametrize(("place", "files"), [("host", 0), ("disk", FILES)])
def test_work_for_rows_of_a_cpu_has_a_name(place: str, files: int) -> None:
    pipe = tiny.pipeline(WanPipeline)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        _, trace = edit(pipe, store=Store(place=place))
    locked, layers = sum(row["forwards"] == 3 for row in trace), len(pipe.transformer.blocks)
    found = ranges(seen)
    assert found.pop("read_rows") >= locked * layers  # more where both branches do not fit
    assert found == {"write_rows": locked * 2 * layers} | ({"close_file": locked * files} if files else {})


def test_the_wait_for_a_checksum_has_a_name(tmp_path) -> None:
    (tmp_path / "step").write_bytes(b"rows")
    verifier = Verifier(tmp_path, tmp_path, {"step": {"sha256": digest(tmp_path / "step")}}, {})
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        verifier.require("step")
        verifier.require("step")  # right already: nothing to wait for
    verifier.stop()
    assert ranges(seen) == {"wait_for_checksum": 1}
