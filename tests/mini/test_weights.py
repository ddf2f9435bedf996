"""The shipped weights: they load by diffusers alone, are small, and do what their card says on a held-out scene."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanVACEPipeline

import kvlock
from kvlock import mini
from kvlock.mini import quality, scenes
from kvlock.report import psnr


@pytest.fixture(scope="module")
def pipe():
    return mini.load()


def test_the_weights_load_by_from_pretrained_alone_and_are_small():
    pipe = WanVACEPipeline.from_pretrained(mini.PATH)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    assert sum(file.stat().st_size for file in mini.PATH.rglob("*") if file.is_file()) <= 20 * 2**20


def test_the_vae_gives_whole_held_out_videos_back(pipe):
    assert quality.round_trip(pipe.vae, 2).whole > 28


@pytest.mark.parametrize("preset", ["plain", "kv-lock"])
def test_an_edit_shows_what_was_asked_for(pipe, preset):
    source, target = quality.request(scenes.HELD_OUT + 54)
    video, mask = scenes.render(source), scenes.box_mask(source)
    edit = kvlock.KVLockPipeline(pipe, kvlock.preset(preset))
    generator = torch.Generator().manual_seed(4)
    out = edit(video, mask, target.caption, num_inference_steps=12, generator=generator).frames
    assert quality.judge(video, mask, source) == (source.shape, source.colour)
    assert quality.judge(out, mask, source) == (target.shape, target.colour)
    assert psnr((out - video)[~mask].square().mean().item()) > 26


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match=r"no pipeline at /nowhere: model_index\.json is missing"):
        mini.load("/nowhere")
