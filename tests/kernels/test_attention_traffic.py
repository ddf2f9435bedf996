"""What the kernels of attention load and store, and in which order, seen in the interpreter: a GPU shows no address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from samples import int32, normal
from torch import Tensor

pytestmark = pytest.mark.parametrize("implementation", ["interpreter"], indirect=True)

B, M, N, H, D = 1, 70, 130, 3, 32
ROWS = [3, 5, 30, 64, 65, 129]  # of the tiles of 32 keys the third and the fourth have one each, or none


class Traffic:
    """The elements of tensors that masked loads and stores touched, one call after the other."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}
        self.calls: list[tuple[str, str, np.ndarray]] = []  # "load" or "store", tensor, numbers of elements

    def watch(self, **tensors: Tensor) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        self._known |= tensors

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        touched = pointers.data[mask.data.astype(bool)].astype(np.int64)
        for name, tensor in self._known.items():
            start = tensor.data_ptr()
            inside = touched[(touched >= start) & (touched < start + tensor.nbytes)]
            if inside.size:
                self.calls.append((kind, name, (inside - start) // tensor.element_size()))

    def loaded(self, name: str) -> np.ndarray:
        found = [elements for kind, tensor, elements in self.calls if (kind, tensor) == ("load", name)]
        return np.concatenate(found) if found else np.empty(0, np.int64)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
    yield seen


def call(traffic: Traffic, ratio: float) -> list[Tensor]:
    q, k, v = (normal(B, n, H, D, seed=seed) for seed, n in enumerate((M, N, N)))
    k_source, v_source = (normal(B, len(ROWS), H, D, seed=seed) for seed in (3, 4))
    traffic.watch(k=k, v=v, k_source=k_source, v_source=v_source)
    return [q, k, v, k_source, v_source, int32(*ROWS), torch.tensor([ratio])]


def locked(elements: np.ndarray) -> np.ndarray:
    """Those of elements of keys or values that belong to background tokens."""
    return elements[np.isin(elements // (H * D) % N, ROWS)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_loop_loads_what_it_mixes_and_nothing_else(traffic: Traffic, ratio: float) -> None:
    from kvlock_kernels._triton.in_loop import attend_in_loop

    attend_in_loop(*call(traffic, ratio), scale=0.2)
    for name in "kv":
        new, source = traffic.loaded(name), traffic.loaded(f"{name}_source")
        times = new.size // np.unique(new).size  # one for each tile of queries
        assert times > 1
        assert source.size == (0 if ratio == 0 else times * B * len(ROWS) * H * D)  # none in a tile without rows
        assert locked(new).size == (0 if ratio == 1 else times * B * len(ROWS) * H * D)
        assert new.size - locked(new).size == times * B * (N - len(ROWS)) * H * D


def test_the_one_launch_mixes_one_head_ahead_of_the_one_it_attends_to(traffic: Traffic) -> None:
    from kvlock_kernels._triton.persistent import attend_persistently_

    args = call(traffic, 0.3)
    attend_persistently_(*args, scale=0.2)
    head_of = lambda elements: int(np.unique(elements // D % H).item())
    mixed, attended = [], []  # by the number of the call
    for number, (kind, name, elements) in enumerate(traffic.calls):
        if name == "k" and kind == "store":
            mixed.append((number, head_of(elements)))
        if name == "k" and kind == "load" and elements.size > len(ROWS) * D:  # a tile of keys
            attended.append((number, head_of(elements)))
    begins = lambda calls, head: min(number for number, of in calls if of == head)
    ends = lambda calls, head: max(number for number, of in calls if of == head)
    for head in range(H):
        assert ends(mixed, head) < begins(attended, head)
        if head + 1 < H:
            assert ends(mixed, head + 1) < begins(attended, head)  # ahead of it
        if head + 2 < H:
            assert ends(attended, head) < begins(mixed, head + 2)  # and no further
