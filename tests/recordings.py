"""What the tests of recordings share: how one is made, and an edit from it."""

from __future__ import annotations

from typing import Any

import tiny

import kvlock
from kvlock import KVLockConfig, Recording

STEPS = 6
CONFIG = KVLockConfig(kappa=3, window=3, tau=0.6)


def edit(pipe: Any, config: KVLockConfig = CONFIG, *, masks: Any = None, source: Any = None, **options: Any):
    """The final latents of an attached call, and its trace; with `steps` and `seed` of the call among the options."""
    call = {name: options.pop(name) for name in ("steps", "seed", "video") if name in options}
    masks = tiny.masks(pipe) if masks is None else masks
    source = tiny.source_latents() if source is None else source
    if "recording" not in options:
        options["source_prompt_embeds"] = tiny.SOURCE_PROMPT
    with kvlock.attach(pipe, source, masks, config=config, **options) as session:
        latents = tiny.call(pipe, **({"steps": STEPS} | call))
    return latents, session.trace.rows()


def make(
    pipe: Any, path: Any, config: KVLockConfig = CONFIG, *, steps: int = STEPS, counted: bool = True, **options: Any
) -> Recording:
    """A recording; `counted` says whether the source runs once in every locked step, and in no other."""
    options = {"source_prompt_embeds": tiny.SOURCE_PROMPT} | options
    with kvlock.record(pipe, path, tiny.source_latents(), tiny.masks(pipe), config=config, **options) as session:
        tiny.call(pipe, steps=steps)
    forwards = [row["forwards"] for row in session.trace.rows()]
    locked = config.locked_steps(steps, start=steps - len(forwards))
    assert not counted or (sum(forwards) == len(locked) and set(forwards) <= {0, 1})
    return Recording(path)
