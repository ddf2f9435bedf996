"""Whose call it is: the attached pipeline's, or that of another one of the same transformer and scheduler."""

import contextlib
from unittest import mock

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline

from kvlock import KVLockConfig

STEPS = 5
LOCK = KVLockConfig(kappa=3, window=3, tau=0.6)


@pytest.mark.parametrize("called", ["never", "to its end", "until it was stopped"])
def test_another_pipeline_of_the_same_parts_called_inside_the_block_is_refused(called):
    pipe = tiny.pipeline(WanPipeline, "unipc")
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    another = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in names})  # as from_pipe makes it
    another.set_progress_bar_config(disable=True)
    stop = {"callback_on_step_end": mock.Mock(side_effect=KeyboardInterrupt)} if "stopped" in called else {}
    with contextlib.suppress(KeyboardInterrupt):
        if called != "never":  # else it has a guidance, with which the lock would go on
            tiny.call(pipe, steps=2, guidance_scale=3.0, **stop)
    with pytest.raises(ValueError, match="WanPipeline, which is attached, does not run"), tiny.attached(pipe, LOCK):
        tiny.call(another, steps=STEPS)
    assert tiny.leftovers(pipe) == []


def test_a_subclass_with_a_call_of_its_own_that_keeps_no_timestep_is_followed():
    wan = tiny.pipeline(WanPipeline, "unipc")

    class Own(WanPipeline):
        __setattr__ = lambda self, name, value: name == "_current_timestep" or super().__setattr__(name, value)

    own = Own(**wan.components)
    own.set_progress_bar_config(disable=True)
    expected, _ = tiny.locked_call(wan, LOCK, steps=STEPS)
    assert torch.equal(tiny.locked_call(own, LOCK, steps=STEPS)[0], expected)
    assert not hasattr(own, "_current_timestep")
