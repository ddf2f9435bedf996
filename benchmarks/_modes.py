"""The ways to edit that `benchmarks.edit` times, by the names of its rows."""

import math
from dataclasses import replace
from typing import NamedTuple

import kvlock
from benchmarks._edit_rows import PIPELINE
from kvlock import KVLockConfig, Store

STEPS, LOCKED_STEPS = 5, 3  # of a timed edit, which locks the last ones; the first of each kind warms up
USUAL, HALF = "store, hooks", "half the layers, hooks"
KAPPA = 0.4  # the share of locked steps in an edit of the paper's settings, 20 of 50


class Mode(NamedTuple):
    """One way to edit."""

    config: KVLockConfig = kvlock.preset("kv-lock", kappa=LOCKED_STEPS)
    kernel: str = "hooks"
    store: Store = Store()
    recorded: bool = False  # the source is recorded beforehand, which is not timed
    target: float = 1.22  # of an edit of Wan over the plain pipeline; forwards alone make 1.20
    layers: float = 1  # the share of the blocks that lock, the first ones
    same: str = USUAL  # the mode that has the same latents but for rounding; blank for none

    def config_of(self, blocks: int) -> KVLockConfig:
        """The config for a transformer of so many blocks."""
        return self.config if self.layers == 1 else replace(self.config, layers=tuple(range(int(self.layers * blocks))))


MODES = {
    "preset plain": Mode(kvlock.preset("plain"), target=1.01, same=PIPELINE),
    USUAL: Mode(),
    "store, fused": Mode(kernel="fused"),
    "store, backend": Mode(kernel="backend"),
    "store, backend, full": Mode(kvlock.preset("full-lock", kappa=LOCKED_STEPS), "backend", same=""),
    HALF: Mode(target=1.12, layers=0.5, same=""),  # its source runs half of the blocks: forwards make 1.10
    "batch, hooks": Mode(kvlock.preset("kv-lock", kappa=LOCKED_STEPS, source="batch"), target=math.inf),
    "store int8, hooks": Mode(store=Store("int8")),
    "store fp8, hooks": Mode(store=Store("fp8")),
    "store on the host, hooks": Mode(store=Store(place="host")),
    "store int8 on the host, hooks": Mode(store=Store("int8", place="host")),
    "store fp8 on the host, hooks": Mode(store=Store("fp8", place="host")),
    "store on disk, hooks": Mode(store=Store(place="disk")),
    "store int8 on disk, hooks": Mode(store=Store("int8", place="disk")),
    "store fp8 on disk, hooks": Mode(store=Store("fp8", place="disk")),
    "recording, hooks": Mode(recorded=True, target=1.03),
    "recording int8, hooks": Mode(store=Store("int8"), recorded=True, target=1.03),
    "recording fp8, hooks": Mode(store=Store("fp8"), recorded=True, target=1.03),
}
