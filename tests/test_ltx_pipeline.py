"""LTX: from a video and a prompt to an edited video, in Python and by the commands."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_ltx
import torch
from diffusers import LTXPipeline
from PIL import Image

from kvlock import KVLockConfig, KVLockPipeline, attach, encode_source
from kvlock.adapters.prompts import encode_prompt
from kvlock.adapters.vae import decode
from kvlock.cli import runs
from kvlock.cli.inputs import read_source
from kvlock.mini import models
from kvlock.video import write_video

pytest_plugins = ["command_line"]


@pytest.fixture(scope="module")
def whole():
    """With the miniature's tokenizer and text encoder."""
    torch.manual_seed(2)
    encoder = models.build_text_encoder().eval()
    return tiny_ltx.pipeline(
        tokenizer=models.build_tokenizer(), text_encoder=encoder, caption_channels=encoder.config.d_model
    )


VIDEO = tiny.rand(tiny_ltx.FRAMES, tiny_ltx.SIZE, tiny_ltx.SIZE, 3, seed=8).sigmoid()


def test_a_prompt_is_encoded_without_the_tokens_that_its_mask_leaves_out(whole):
    embeds, mask, *_ = whole.encode_prompt("a red star", do_classifier_free_guidance=False)
    kept = encode_prompt(whole, "a red star")
    assert 1 < kept.shape[1] == mask.sum() < mask.shape[1]
    torch.testing.assert_close(kept, embeds[:, : kept.shape[1]])


def test_source_latents_are_what_the_pipeline_would_decode(whole):
    source = encode_source(whole, VIDEO)
    z = whole.vae.encode(VIDEO.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()
    mean, std = (x[None, :, None, None, None] for x in (whole.vae.latents_mean, whole.vae.latents_std))
    torch.testing.assert_close(source, (z - mean) * 0.5 / std)
    back = whole._denormalize_latents(source, whole.vae.latents_mean, whole.vae.latents_std, 0.5)
    torch.testing.assert_close(back, z)


def test_the_pipeline_edits_a_video(whole):
    editor = KVLockPipeline(whole, KVLockConfig(kappa=4, window=3, tau=0.5))
    arguments = {"num_inference_steps": 6, "guidance_scale": 3.0, "frame_rate": 24}
    with torch.random.fork_rng():
        out = editor(
            VIDEO, tiny_ltx.pixel_mask(), "a blue star", source_prompt="a red star", generator=seeded(), **arguments
        )
    assert out.frames.shape == VIDEO.shape
    tiny.assert_locked(out.trace.rows(), editor.config)
    source, masks = encode_source(whole, VIDEO), tiny_ltx.masks(whole)
    prompt = encode_prompt(whole, "a red star")
    size = {"height": tiny_ltx.SIZE, "width": tiny_ltx.SIZE, "num_frames": tiny_ltx.FRAMES, "output_type": "pt"}
    with attach(whole, source, masks, config=editor.config, source_prompt_embeds=prompt):
        expected = whole("a blue star", generator=seeded(), **size, **arguments).frames[0]
    assert torch.equal(out.frames, expected.movedim(1, -1).clamp(0, 1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def inputs(whole, tmp_path_factory):
    """The options that name a model, a video and a mask."""
    folder = tmp_path_factory.mktemp("ltx")
    whole.save_pretrained(folder / "model")
    write_video(folder / "in.mp4", (VIDEO * 255).to(torch.uint8), 24)
    write_video(folder / "mask.mp4", tiny_ltx.pixel_mask()[..., None].expand(-1, -1, -1, 3).float(), 24)
    return ["--model", folder / "model", "--video", folder / "in.mp4", "--mask", folder / "mask.mp4"]


def test_the_commands_record_and_edit(kvlock, here, inputs, monkeypatch):
    calls, plain = [], LTXPipeline.__call__

    @wraps(plain)
    def call(*args, **kwargs):
        calls.append(kwargs["frame_rate"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(LTXPipeline, "__call__", call)
    steps = ("--steps", 6, "--source-prompt", "a red star")
    edit = ("--prompt", "a blue star", "--tau", 0.5)
    assert kvlock("record", *inputs, *steps, "--out", "source.kvlock")[0] == 0
    assert kvlock("edit", "--source", "source.kvlock", *edit, "--out", "one/out.mp4")[0] == 0
    code, out, err = kvlock("edit", *inputs, *steps, *edit, "--out", "two/out.mp4")
    assert code == 0, err
    assert out[-1].endswith(": 15 rows through the transformer")
    assert calls == [24, 24, 24]
    assert Path("one/out.mp4").read_bytes() == Path("two/out.mp4").read_bytes()


def test_pictures_without_a_rate_have_the_pipelines_own(inputs, tmp_path):
    arguments = {"mask": None, "mask_box": "32,32,96,96", "example": None, "model": str(inputs[1]), "steps": 6}
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(9):
        Image.new("RGB", (192, 192), (10 * i, 0, 0)).save(frames / f"{i}.png")
    arguments |= {"video": frames, "trim": False}
    for video, rate in ((frames, 25), (inputs[3], 24)):
        args = SimpleNamespace(**(arguments | {"video": video}))
        task = runs.checked(args, KVLockConfig(), read_source(args), {}, [])
        assert task.settings["frame_rate"] == task.source.fps == rate


def test_the_estimate_counts_one_call_for_both_branches(kvlock, inputs):
    code, out, err = kvlock("estimate", *inputs, "--steps", 6, "--dtype", "float32")
    assert code == 0, err
    assert "15 with it (1.25x), source='batch': it runs beside both branches" in out[5]


def test_a_decoder_that_is_told_of_noise_is_told_that_there_is_none():
    pipe = tiny_ltx.pipeline()
    latents = tiny_ltx.source_latents()
    pipe.vae = tiny_ltx.vae(timestep_conditioning=True)
    with torch.no_grad():
        z = pipe._denormalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std, 0.5)
        expected = pipe.vae.decode(z, torch.zeros(1)).sample[0].transpose(0, 1).clamp(-1, 1)
    torch.testing.assert_close(decode(pipe, latents), expected)
