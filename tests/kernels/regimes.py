"""Combinations of sizes, dtypes, ratios and layouts that agreement with the definition is tested on."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from samples import DTYPES, scattered
from torch import Tensor

INT8, FP8 = torch.int8, torch.float8_e4m3fn
STREAMING: dict[str, Sequence[Any]] = {
    "tokens": (1, 45, 128, 257),
    "dim": (24, 32, 64, 128, 256),
    "heads": (1, 2, 3),
    "ratio": (0.0, 0.3, 1.0),
    "share": (0.0, 0.4, 1.0),  # of the tokens, that have a source row
    "dtype": DTYPES,
    "source": (*((dtype, False) for dtype in (*DTYPES, INT8, FP8)), (INT8, True), (FP8, True)),  # dtype, with a mean
    "samples": ((1, 1), (2, 1), (2, 2)),  # of the tensor and of its source
    "contiguous": (True, False),
}


def sources_of_values(regime: dict[str, Any]) -> tuple[int, torch.dtype, bool]:
    """Samples, dtype and mean of the source of values where those in the regime are of keys: all of them others."""
    b, of_keys = regime["samples"]
    kinds = STREAMING["source"]
    return b if of_keys == 1 else 1, *kinds[(kinds.index(regime["source"]) + 1) % len(kinds)]


def pairwise(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which any two values of any two axes meet at least once."""
    places = [(name, i) for name, values in axes.items() for i in range(len(values))]
    missing = {pair: None for pair in itertools.combinations(places, 2) if pair[0][0] != pair[1][0]}  # an ordered set
    found = []
    while missing:
        chosen = dict(next(iter(missing)))
        for name in axes:
            if name not in chosen:
                gains = [
                    sum((place, (name, i)) in missing or ((name, i), place) in missing for place in chosen.items())
                    for i in range(len(axes[name]))
                ]
                chosen[name] = gains.index(max(gains))
        for pair in [pair for pair in missing if all(chosen[name] == i for name, i in pair)]:
            del missing[pair]
        found.append({name: axes[name][chosen[name]] for name in axes})
    return found


def every(axes: dict[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """All combinations."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def all_of(dim: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """All combinations of the streaming kernels with this head dimension and dtype: two samples, strided tensors."""
    fixed = {"heads": (2,), "samples": ((2, 1),), "contiguous": (False,), "dim": (dim,), "dtype": (dtype,)}
    return every(STREAMING | fixed)


def each_regime(axes: dict[str, Sequence[Any]] = STREAMING) -> pytest.MarkDecorator:
    """Runs a test on the pairwise combinations; it gets one as `regime`, a dict by the names of the axes."""
    regimes = pairwise(axes)
    return pytest.mark.parametrize("regime", regimes, ids=[regime_name(r) for r in regimes])


def regime_name(regime: dict[str, Any]) -> str:
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in regime.values())


def rows_of(tokens: int, share: float) -> tuple[Tensor, Tensor]:
    """A scattered index of a share of the tokens, and its inverse: the row of each token, -1 for none."""
    index = scattered(tokens, round(share * tokens))
    source_row = torch.full((tokens,), -1, dtype=torch.int32)
    source_row[index.long()] = torch.arange(len(index), dtype=torch.int32)
    return index, source_row
