"""What the tests of the command line share: fixtures, which a test file gets by naming this module as a plugin."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from diffusers import (
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from matplotlib.figure import Figure

from kvlock import cli, video
from kvlock.cli import runs
from kvlock.mini import models, scenes


def save_model(path, pipeline, transformer, *, boundary=None, **changes):
    """A random pipeline on disk, with the miniature's words; with a `boundary` a second transformer below it."""
    torch.manual_seed(0)

    def build():
        return transformer(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=models.TEXT_DIM,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
            **changes,
        )

    pipe = pipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=models.build_text_encoder(),
        vae=tiny.vae(),
        scheduler=models.build_scheduler(),
        transformer=build(),
        **({} if boundary is None else {"transformer_2": build(), "boundary_ratio": boundary}),
    )
    pipe.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny VACE model."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    return save_model(path, WanVACEPipeline, WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=96)


@pytest.fixture(scope="session")
def v2v_model(tmp_path_factory):
    """A tiny video-to-video model."""
    return save_model(tmp_path_factory.mktemp("v2v") / "tiny", WanVideoToVideoPipeline, WanTransformer3DModel)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    """A tiny model of two transformers; of 20 steps the second runs the last five."""
    return save_model(tmp_path_factory.mktemp("two") / "tiny", WanPipeline, WanTransformer3DModel, boundary=0.55)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def clip(tmp_path):
    """A video of 5 frames of 96x96 pixels and its mask, as files outside the current folder."""
    return write_clip(tmp_path)


def write_clip(folder):
    scene = scenes.sample(scenes.HELD_OUT)
    frames, mask = scenes.render(scene)[:5], scenes.box_mask(scene)[:5]
    video.write_video(folder / "in.mp4", frames, 8)
    video.write_video(folder / "mask.mp4", mask[..., None].expand_as(frames).float(), 8)
    return SimpleNamespace(video=str(folder / "in.mp4"), mask=str(folder / "mask.mp4"), frames=frames, inside=mask)


@pytest.fixture
def kvlock(capsys):
    """Run the command line: exit code, lines on stdout, lines on stderr.

    Its pictures are composed, but their files are empty unless they are to be drawn, which takes most of a short edit.
    """

    def run(*argv, drawn=False):
        undrawn = mock.patch.object(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
        try:
            with contextlib.nullcontext() if drawn else undrawn:
                code = cli.main([str(argument) for argument in argv])
        except SystemExit as leave:
            code = leave.code
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.fixture
def no_denoising(monkeypatch):
    """Edits come back at once, as the source in grey; returns the calls."""
    calls = []

    def denoise(pipe, config, task, args, *, kernel="hooks", store=None):
        source, settings = task.source, task.settings | {"guidance_scale": args.guidance_scale}
        call = {"pipe": pipe, "config": config, "source": source, "seed": args.seed, "settings": settings}
        calls.append(SimpleNamespace(**call, kernel=kernel, store=store, recording=task.recording))
        summary = {"forwards": 0, "steps": 9, "locked_steps": 4, "composite": config.composite}
        trace = SimpleNamespace(
            to_dict=lambda: {"version": 1, "config": config.to_dict(), "steps": [], "summary": summary}
        )
        masks = SimpleNamespace(num_tokens=1, background_rows=1)
        return SimpleNamespace(frames=torch.full(source.frames.shape, 0.5), trace=trace, masks=masks)

    monkeypatch.setattr(runs, "denoise", denoise)
    return calls


@pytest.fixture
def written():
    """The names of all files below a folder."""
    return lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
