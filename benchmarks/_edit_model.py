"""The cost model of a whole edit: seconds of a step, from the FLOP and bytes of its forwards and of its lock.

Counted without data or GPU: the FLOP of attention and of products of matrices, and then the bytes of every other step,
each over what a GPU is assumed to reach, as for operators. The start of a launch is left out, and what comes once a
step: guidance, the variance, the scheduler.
"""

import dataclasses
import functools
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import _edits, lerp, norm_rope, packing
from benchmarks._case import WAN_1_3B_480P, Rates, Traffic, background_rows
from benchmarks._eager_bytes import Counting
from benchmarks._model import predict
from benchmarks._modes import KAPPA, Mode
from benchmarks.lerp import RATIO
from kvlock.cost import Cost, ModelSizes, estimate
from kvlock.store import Store

SIZES = {
    name: ModelSizes(sizes["num_layers"], sizes["num_attention_heads"], _edits.HEAD_DIM, token_values=64)
    for name, sizes in _edits.SHAPES.items()
}
BRANCHES = 2  # with the prompt and with the negative one; each is a forward
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


def forward(shape: str, blocks: int | None = None) -> Forward:
    """Of this shape of Wan by eager diffusers, or of its first blocks; one and two tell of all, which are alike."""
    one, two = (_counted(shape, layers) for layers in (1, 2))
    others = (SIZES[shape].layers if blocks is None else blocks) - 1
    return Forward(one.flop + others * (two.flop - one.flop), one.bytes + others * (two.bytes - one.bytes))


@functools.cache
def _counted(shape: str, layers: int) -> Forward:
    model = _edits.transformer("meta", _edits.SHAPES[shape] | {"num_layers": layers})
    latents, prompt = (
        torch.empty(size, device="meta", dtype=torch.bfloat16) for size in (_edits.latents(), (1, *_edits.PROMPT))
    )
    with torch.no_grad(), Counting() as counting:
        model(latents, torch.empty(1, device="meta"), prompt)
    return Forward(counting.flop, counting.bytes)


def cost_of(shape: str, mode: Mode, tokens: int, background: int) -> Cost:
    """Forwards and memory of an edit in this mode with the paper's share of locked steps."""
    config = mode.config_of(SIZES[shape].layers)
    config = dataclasses.replace(config, kappa=KAPPA) if config.locks else config
    return estimate(
        SIZES[shape], config, tokens=tokens, background_rows=background, store=mode.store, kernel=mode.kernel
    )


def seconds(shape: str, mode: Mode, background: float, gpu: Rates) -> Seconds:
    """Steps of an edit of which `background` is the share of locked tokens, in 80ths, as in the rows of operators.

    The longer counts of what computes and of the copies between the host and the device, each of which hides behind the
    other. What files take is left out.

    Raises:
        ValueError: as `_lock`.
    """
    one, video = forward(shape).seconds(gpu), WAN_1_3B_480P
    costs = cost_of(shape, mode, video.tokens, background_rows(video, background))
    if not mode.config.locks:
        return Seconds(BRANCHES * one, BRANCHES * one)
    sources = 0 if mode.recorded else 1 if mode.config.source == "store" else BRANCHES
    on_source = sources * forward(shape, costs.source_blocks).seconds(gpu)
    layers = mode.config_of(SIZES[shape].layers).layers or range(SIZES[shape].layers)
    computes = BRANCHES * one + on_source + len(layers) * _lock(shape, mode, background, gpu)
    moved = costs.bytes_moved_replay if mode.recorded else costs.bytes_moved
    return Seconds(BRANCHES * one, max(computes, moved / LINK))


def _lock(shape: str, mode: Mode, share: float, gpu: Rates) -> float:
    """Seconds that a locked step spends in one layer beside what its forwards spend there.

    Raises:
        ValueError: the mode is one that the runner does not have, and that nothing here counts.
    """
    sizes, given = WAN_1_3B_480P._replace(heads=SIZES[shape].heads), torch.bfloat16
    store, batch, full = mode.store, mode.config.source == "batch", mode.config.fusion == "full"
    if (batch and mode.kernel == "fused") or (full and (mode.kernel != "backend" or batch or store != Store())):
        raise ValueError(f"{mode} has no prediction")
    kept = store.storage_dtype(given)
    gathers = 0 if mode.recorded else BRANCHES if batch else 1  # of source rows, from the source's keys and values
    if mode.kernel == "fused":
        eager = predict(norm_rope.case(sizes, given, 0.0), "diffusers, eager", gpu).us
        steps = BRANCHES * [norm_rope.traffic(sizes, share=share, source=kept)]
        steps += gathers * [norm_rope.traffic(sizes, share=share, source=kept, packs=True)]
        return sum(step.predicted_us(gpu) - eager for step in steps) / 1e6
    copied = partial(packing.traffic, sizes, dtype=given, packs=True)
    if full:  # rows of the foreground join all of the source's
        steps = 2 * [copied(share=1.0)] + 2 * BRANCHES * [copied(share=1 - share)]
    else:
        mean = Traffic(background_rows(sizes, share) * sizes.heads * sizes.dim, ((6.0, "mean of the keys"),))
        steps = gathers * (2 * [copied(share=share, dtype=kept)] + store.takes_mean * [mean])
        steps += BRANCHES * [lerp.traffic(sizes, share=share, source=kept, ratio=RATIO, tensors=2)]
    return sum(step.predicted_us(gpu) for step in steps) / 1e6
