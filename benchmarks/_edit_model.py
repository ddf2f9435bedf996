"""The cost model of a whole edit: seconds of a step, from the FLOP and bytes of its forwards and of its lock.

Counted without data or GPU, over what a GPU is assumed to reach, as for operators. The start of a launch is left out,
and what comes once a step: guidance, the variance, the scheduler.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch

from benchmarks import _edits, lerp, norm_rope, packing
from benchmarks._case import Rates, Shape
from benchmarks._eager_bytes import Counting
from benchmarks._model import predict
from benchmarks.edit import KAPPA, Mode
from benchmarks.lerp import RATIO
from kvlock.config import DEFAULT_KAPPA
from kvlock.cost import Cost, ModelSizes, estimate
from kvlock.store import DTYPES

GRID = 21, 30, 52  # tokens of the video: frames, rows and columns
SIZES = {
    name: ModelSizes(sizes["num_layers"], sizes["num_attention_heads"], _edits.HEAD_DIM, token_values=64)
    for name, sizes in _edits.SHAPES.items()
}
BRANCHES = 2  # with guidance and without; each is a forward
LINK = 50e9  # bytes a second, what pinned copies over PCIe 5 with 16 lanes reach


class Forward(NamedTuple):
    """What one forward of one sample multiplies and moves."""

    flop: float
    bytes: float

    def seconds(self, gpu: Rates) -> float:
        return self.flop / gpu.products + self.bytes / gpu.bandwidth


class Seconds(NamedTuple):
    """Of a step without a lock, and of one with."""

    plain: float
    locked: float

    @property
    def edit_ratio(self) -> float:
        """An edit with KAPPA of its steps locked over the plain pipeline."""
        return 1 - KAPPA + KAPPA * self.locked / self.plain


@functools.cache
def forward(shape: str) -> Forward:
    """Of this shape of Wan by eager diffusers. Its blocks are alike, so that one and two of them tell of all."""
    one, two = (_counted(_edits.SHAPES[shape] | {"num_layers": layers}) for layers in (1, 2))
    others = SIZES[shape].layers - 1
    return Forward(one.flop + others * (two.flop - one.flop), one.bytes + others * (two.bytes - one.bytes))


def _counted(sizes: dict[str, int]) -> Forward:
    model = _edits.transformer("meta", sizes)
    latents, prompt = (
        torch.empty(size, device="meta", dtype=torch.bfloat16) for size in (_edits.latents(), (1, *_edits.PROMPT))
    )
    with torch.no_grad(), Counting() as counting:
        model(latents, torch.empty(1, device="meta"), prompt)
    return Forward(counting.flop, counting.bytes)


def cost_of(shape: str, mode: Mode, tokens: int, background: int) -> Cost:
    """Forwards and memory of an edit in this mode with the paper's share of locked steps."""
    config = mode.config_of(SIZES[shape].layers)
    config = dataclasses.replace(config, kappa=DEFAULT_KAPPA) if config.locks else config
    return estimate(
        SIZES[shape], config, tokens=tokens, background_rows=background, store=mode.store, kernel=mode.kernel
    )


def seconds(shape: str, mode: Mode, background: float, gpu: Rates) -> Seconds:
    """Steps of an edit of which `background` is the share of locked tokens.

    Copies between the host and the device hide behind what computes, or it behind them. What files take counts nothing.
    """
    one = forward(shape).seconds(gpu)
    tokens = Shape("", GRID, 1).tokens
    costs = cost_of(shape, mode, tokens, round(background * tokens))
    if not costs.locked_steps:
        return Seconds(BRANCHES * one, BRANCHES * one)
    source = 0.0 if mode.recorded else (costs.forwards - costs.forwards_plain) / costs.locked_steps
    layers = mode.config_of(SIZES[shape].layers).layers or range(SIZES[shape].layers)
    computes = (BRANCHES + source) * one + len(layers) * _lock(shape, mode, background, gpu)
    moved = costs.bytes_moved_replay if mode.recorded else costs.bytes_moved
    return Seconds(BRANCHES * one, max(computes, moved / LINK))


def _lock(shape: str, mode: Mode, share: float, gpu: Rates) -> float:
    """Seconds that a locked step spends in one layer beside what its forwards spend there."""
    sizes = Shape("", GRID, SIZES[shape].heads)
    given, kept = torch.bfloat16, DTYPES[mode.store.dtype] or torch.bfloat16
    records = mode.config.source == "store" and not mode.recorded
    if mode.kernel == "fused":
        eager = predict(norm_rope.case(sizes, given, 0.0), "diffusers, eager", gpu).us
        passes = BRANCHES * [norm_rope.traffic(sizes, share=share, source=kept)]
        passes += [norm_rope.traffic(sizes, share=share, source=kept, packs=True)] if records else []
        return sum(each.predicted_us(gpu) - eager for each in passes) / 1e6
    if mode.kernel == "backend" and mode.config.fusion == "full":  # foreground rows join all of the source's
        steps = [packing.traffic(sizes, dtype=given, packs=True, share=1.0)] * 2
        steps += [packing.traffic(sizes, dtype=given, packs=True, share=1 - share)] * 2 * BRANCHES
    else:
        keeps = packing.traffic(sizes, dtype=kept, packs=True, share=share)  # of keys; of values as many
        steps = [keeps] * 2 * (records or BRANCHES * (mode.config.source == "batch"))
        steps += [lerp.traffic(sizes, share=share, source=kept, ratio=RATIO, tensors=2)] * BRANCHES
    return sum(each.predicted_us(gpu) for each in steps) / 1e6
