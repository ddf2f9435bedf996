"""The cost model: how long a provider needs for a case, from bytes, FLOP and what a GPU is assumed to reach."""

import functools
from typing import NamedTuple

from benchmarks._case import Case, Products, Rates
from benchmarks._eager_bytes import eager_bytes

STEP_BY_STEP = ("eager", "diffusers, eager")
# FLOP a second that are published for forward attention on an H100, not causal, bf16, D = 128, 8192 tokens and more.
PUBLISHED = {
    "SDPA FLASH": 3.7e14,  # FlashAttention-2, which this backend of torch is
    "flash-attn 2": 3.7e14,
    "flash-attn 3": 6.46e14,
    "FlexAttention": 2.9e14,  # with its default tiles
    "SageAttention": 5.17e14,
}
SIMPLE_LOOP = 3.9e14  # of the loop of Triton's tutorial, which is that of these
SIMPLE_LOOPS = ("kvlock in loop, no rows", "in loop", "one launch", "one launch, no rows")
# Mixing in the loop issues instructions for 2960 cycles a tile, and the products of the tile take 2048.
MIXING = 2960 / 2048


class Prediction(NamedTuple):
    """Microseconds, and what they are counted from."""

    us: float
    counted: str


def predict(case: Case, provider: str, gpu: Rates) -> Prediction:
    """The time of a provider of this name; one that the case does not have counts as the case itself."""
    work = case.work(case.shape)
    if isinstance(work, Products):
        return _products(case, work, provider, gpu)
    if provider in STEP_BY_STEP:
        return Prediction(1e6 * _eager_bytes(case, provider) / gpu.bandwidth, "bytes of every step")
    return Prediction(work.predicted_us(gpu), "fewest bytes")


def _products(case: Case, work: Products, provider: str, gpu: Rates) -> Prediction:
    if provider in PUBLISHED:
        return Prediction(1e6 * work.amount / min(PUBLISHED[provider], gpu.products), "FLOP at the published rate")
    if provider in SIMPLE_LOOPS:
        loop = 1e6 * work.amount / min(SIMPLE_LOOP, gpu.products)
        if provider == "in loop":
            return Prediction(loop * MIXING, "FLOP in a simple loop, and the cycles of mixing")
        return Prediction(loop, "FLOP in a simple loop")
    first = case.first(case.shape).predicted_us(gpu) if case.first else 0.0
    return Prediction(first + work.predicted_us(gpu), "fewest bytes, then FLOP" if case.first else "FLOP")


@functools.cache
def _eager_bytes(case: Case, name: str) -> int:
    return eager_bytes(case, next(provider for provider in case.providers if provider.name == name))
