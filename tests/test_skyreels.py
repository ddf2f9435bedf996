"""SkyReels V2, whose transformer is a relative of Wan's: the same edit by hooks, by the backend and by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import SkyReelsV2Pipeline
from oracle import edit
from test_oracle import BASE, STEPS, WINDOW, assert_agree, job

import kvlock
from kvlock import KVLockConfig, preset


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(SkyReelsV2Pipeline, "unipc")


@pytest.mark.parametrize("kernel", ["hooks", "backend"])
def test_it_agrees_with_two_passes_written_by_hand(pipe, kernel):
    config, masks = KVLockConfig(**WINDOW), tiny.masks(pipe)
    work = job(masks)
    given = {"prompt_embeds": work.cond, "negative_prompt_embeds": work.uncond}
    with kvlock.attach(
        pipe, work.source, masks, config=config, source_prompt_embeds=work.source_prompt, kernel=kernel
    ) as session:
        latents = tiny.call(pipe, steps=STEPS, latents=work.start, **given)
    tiny.assert_locked(session.trace.rows(), config)
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, BASE), latents, session.trace.rows())
    assert tiny.leftovers(pipe) == []


def test_the_fused_pass_is_refused_and_preset_plain_changes_nothing(pipe):
    with (
        pytest.raises(ValueError, match=r'kernel="fused" does not fit blocks\[0\]'),
        tiny.attached(pipe, KVLockConfig(**WINDOW), kernel="fused"),
    ):
        pass
    plain = tiny.call(pipe)
    with tiny.attached(pipe, preset("plain")):
        assert torch.equal(tiny.call(pipe), plain)
