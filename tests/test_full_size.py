"""The command line on a model of the shape of Wan2.1-VACE-1.3B at 832x480; only its weights are random."""

from __future__ import annotations

import gc
import json

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from kvlock import preset, video
from kvlock.mini import models

pytest_plugins = ["command_line"]

WIDTH, HEIGHT, FRAMES, STEPS = 832, 480, 5, 3
LAYERS, HEADS, HEAD_DIM = 30, 12, 128
BOX = "256,128,512,352"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of the pipeline. Only the text encoder is small: one layer of the width that the transformer wants."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        ffn_dim=8960,
        num_layers=LAYERS,
        vace_layers=list(range(0, LAYERS, 2)),
    )
    torch.set_default_dtype(default)
    tokenizer = models.build_tokenizer()
    pipe = WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )
    assert sum(p.numel() for p in transformer.parameters()) > 2e9
    path = tmp_path_factory.mktemp("wan") / "vace-1.3b"
    pipe.save_pretrained(path)
    del pipe, transformer
    gc.collect()
    return path


@pytest.mark.slow
def test_a_model_of_the_real_shape_is_locked_in_every_layer_of_every_locked_step(kvlock, here, wan, tmp_path):
    frames = torch.rand(FRAMES, HEIGHT // 16, WIDTH // 16, 3, generator=torch.Generator().manual_seed(0))
    frames = frames.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    video.write_video(tmp_path / "in.mp4", frames, 16)
    options = ("--source-prompt", "a star", "--prompt", "a red circle", "--steps", STEPS, "--preset", "fixed-0.5")
    where = ("--video", tmp_path / "in.mp4", "--mask-box", BOX, "--model", wan, "--dtype", "bfloat16")
    code, _, err = kvlock("edit", *where, *options)
    assert code == 0, err
    trace = json.loads((here / "kvlock-out/trace.json").read_text())
    tiny.assert_locked(trace["steps"], preset("fixed-0.5"))
    rows = trace["summary"]["background_rows"]
    assert trace["summary"]["tokens"] == 2 * (HEIGHT // 16) * (WIDTH // 16) and 0 < rows < trace["summary"]["tokens"]
    kept = [row["source_bytes"] for row in trace["steps"]]
    assert kept == [rows * HEADS * HEAD_DIM * 2 * LAYERS * 2 * row["locked"] for row in trace["steps"]]
    assert video.read_video(here / "kvlock-out/out.mp4").frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
