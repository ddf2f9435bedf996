"""The trace keeps tensors until it is read, and reads them all at once."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvlock import KVLockConfig, Trace
from kvlock.trace import TENSORS, StepRecord


def record(step: int, batch: int = 2, **changes) -> StepRecord:
    values = {name: torch.arange(batch) + 10.0 * i + step for i, name in enumerate(TENSORS)}
    plain = {"step": step, "timestep": 900.0 - step, "sigma": 0.9, "in_window": True, "locked": step > 0}
    plain |= {"expert": 0, "forwards": 2 + step}
    return StepRecord(**(plain | {"source_bytes": 100 * step} | values | changes))


@pytest.fixture
def trace() -> Trace:
    found = Trace(KVLockConfig(kappa=3))
    for step in range(3):
        found.append(record(step))
    return found


def test_rows_are_plain_values_with_one_entry_for_each_sample(trace):
    rows = trace.rows()
    assert len(rows) == len(trace) == 3
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["variance_masked"] == [1.0, 2.0]
    assert rows[2]["s_star"] == [10.0 * (len(TENSORS) - 1) + 2, 10.0 * (len(TENSORS) - 1) + 3]
    assert set(rows[0]) == set(StepRecord._fields)


def test_latest_is_the_last_row(trace):
    assert trace.latest() == trace.rows()[-1]


def test_latest_of_an_empty_trace_is_an_index_error():
    with pytest.raises(IndexError):
        Trace(KVLockConfig()).latest()


def test_clear_forgets_every_step(trace):
    trace.clear()
    assert len(trace) == 0
    assert trace.rows() == []


def test_the_dictionary_is_json_with_settings_steps_and_totals(trace):
    found = json.loads(json.dumps(trace.to_dict()))
    assert found["version"] == 1
    assert found["config"] == KVLockConfig(kappa=3).to_dict()
    assert found["steps"] == trace.rows()
    totals = {"steps": 3, "locked_steps": 2, "forwards": 9, "peak_source_bytes": 200, "composite": "none"}
    assert found["summary"] == totals


def test_the_dictionary_of_an_empty_trace_has_zero_totals():
    summary = Trace(KVLockConfig()).to_dict()["summary"]
    assert summary == {"steps": 0, "locked_steps": 0, "forwards": 0, "peak_source_bytes": 0, "composite": "none"}


def test_appending_reads_no_value_and_reading_stacks_before_it_copies(trace):
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        trace.append(record(3, variance_masked=torch.ones(2)))
    assert "_local_scalar_dense" not in seen
    seen.clear()
    with Watch():
        trace.rows()
    assert seen.count("stack") == len(trace) + 1
    assert "_local_scalar_dense" not in seen
