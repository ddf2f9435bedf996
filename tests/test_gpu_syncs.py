"""On a GPU: how often an edit's loop makes the host wait for it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanVACEPipeline

from kvlock import KVLockConfig
from kvlock.adapters.kernels import KERNELS

STEPS = 5


def waits(pipe: Any) -> int:
    """Operators of torch that synchronise, from the first call of the transformer to the end of the last step."""

    def count(*_: Any) -> None:
        begin.remove()
        torch.cuda.set_sync_debug_mode("warn")

    def stop(_pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")
        return kwargs

    begin = pipe.transformer.register_forward_pre_hook(count, prepend=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.call(pipe, steps=STEPS, callback_on_step_end=stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loop_waits_no_more_often_than_the_plain_pipelines(kernel: str, source: str) -> None:
    pipe = tiny.pipeline(WanVACEPipeline, "unipc").to("cuda")
    config = KVLockConfig(kappa=3, window=3, tau=0.6, source=source, background_guidance=1.0, composite="latent")
    with tiny.attached(pipe, config, kernel=kernel):
        tiny.call(pipe, steps=STEPS)  # compiles the kernels
    plain = waits(pipe)
    with tiny.attached(pipe, config, kernel=kernel):
        assert waits(pipe) <= plain
