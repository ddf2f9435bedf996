"""Recording a source on the command line, and the edits made from it."""

import json
import shutil

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import kvlock as package
from kvlock import Recording, cli

pytest_plugins = ["command_line"]


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """A recording of the clip, with a reference, and the options that made it."""
    from command_line import write_clip  # named as a plugin above, which pytest imports first

    folder = tmp_path_factory.mktemp("recorded")
    clip = write_clip(folder)
    Image.new("RGB", (8, 8), "red").save(folder / "ref.png")
    where = ["--video", clip.video, "--mask", clip.mask, "--model", model, "--reference", str(folder / "ref.png")]
    where += ["--source-prompt", "a star", "--steps", "5", "--seed", "3"]
    assert cli.main(["record", *where, "--out", str(folder / "source.kvlock")]) == 0
    return folder / "source.kvlock", where


@pytest.fixture
def made(here, recorded):
    """The recording as source.kvlock in the current folder, and the options that made it."""
    path, where = recorded
    shutil.copytree(path, "source.kvlock")
    return where


def test_a_recording_says_where_it_is_and_what_comes_next(kvlock, here, clip, model):
    where = ["--video", clip.video, "--mask", clip.mask, "--model", model, "--source-prompt", "a star", "--steps", 5]
    code, out, err = kvlock("record", *where, "--out", "new.kvlock")
    assert (code, [line for line in err if "error" in line]) == (0, [])
    assert out[0].startswith("wrote       new.kvlock: ") and out[1].startswith("steps       2 of 5, the last ones")
    assert out[2] == "next        kvlock edit --source new.kvlock --prompt TEXT"


def test_an_edit_from_a_recording_needs_its_prompt_only_and_is_the_one_shot_edit(kvlock, here, made):
    assert kvlock("edit", *made, "--prompt", "a red circle", "--out", "one/out.mp4")[0] == 0
    code, out, _ = kvlock("edit", "--source", "source.kvlock", "--prompt", "a red circle", "--out", "two/out.mp4")
    assert code == 0 and out[-1].endswith(": 10 rows through the transformer")
    assert (here / "one/out.mp4").read_bytes() == (here / "two/out.mp4").read_bytes()
    one, two = (json.loads((here / folder / "trace.json").read_text()) for folder in ("one", "two"))
    assert (one["summary"]["forwards"], two["summary"]["forwards"]) == (12, 10)
    assert two["input"]["recording"] == "source.kvlock" and one["input"]["recording"] is None
    assert two["input"]["source_prompt"] == "a star" and two["input"]["seed"] == 3 and two["input"]["steps"] == 5


def test_other_seeds_are_allowed_and_named(kvlock, here, made):
    code, _, err = kvlock("edit", "--source", "source.kvlock", "--prompt", "a red circle", "--seed", 4)
    assert code == 0
    assert [line for line in err if "was noised with seed 3" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 6], "source.kvlock was recorded with steps 5, this edit has 6; wanted them alike"),
        (["--kernel", "backend"], "was recorded with point before RoPE, this edit has after RoPE"),
        (["--dtype", "bfloat16"], "was recorded with dtypes ['torch.float32'], this edit has ['torch.bfloat16']"),
        (["--video", "x.mp4"], "--source has its own video, conditions and rows; leave out --video"),
        (["--mask-box", "0,0,9,9"], "leave out --mask-box"),
        (["--source-prompt", "b"], "leave out --source-prompt"),
        (["--example"], "leave out --example"),
        (["--rows", "model"], "leave out --rows"),
        (["--place", "host"], "leave out --place"),
        (["--trim"], "leave out --trim"),
        (["--out", "source.kvlock/out.mp4"], "is an input folder, which must not change"),
    ],
)
def test_what_a_recording_decides_cannot_be_asked_for(kvlock, here, made, options, message, written):
    before = written(here)
    code, out, err = kvlock("edit", "--source", "source.kvlock", "--prompt", "a red circle", *options)
    assert (code, out) == (2, []) and message in err[-1]
    assert written(here) == before


def test_another_model_is_refused(kvlock, here, made, model, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.transformer.blocks[0].attn1.to_k.weight.data.add_(0.01)
    pipe.save_pretrained(tmp_path / "other")
    code, _, err = kvlock("edit", "--source", "source.kvlock", "--prompt", "a", "--model", tmp_path / "other")
    assert code == 2 and "was recorded with weights ['" in err[-1]


def test_a_missing_prompt_and_a_missing_recording_are_one_line(kvlock, here, made):
    assert kvlock("edit", "--source", "source.kvlock")[2] == ["kvlock: error: no prompt; wanted --prompt TEXT"]
    code, out, err = kvlock("edit", "--source", "none.kvlock", "--prompt", "a")
    assert (code, out) == (2, []) and err == ["kvlock: error: none.kvlock is no recording: it has no manifest.json"]


def test_a_recording_is_not_written_over(kvlock, here, made, model):
    code, out, err = kvlock("record", *made, "--out", "source.kvlock")
    assert (code, out) == (2, [])
    assert err == ["kvlock: error: source.kvlock exists already; wanted a path where there is nothing yet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "plain"], "fusion='off' with source='store' stores no rows"),
        (["--steps", 2], "nothing was recorded for new.kvlock: no step of a run was locked"),
        (["--steps", 0], "--steps 0 is out of range"),
    ],
)
def test_a_source_that_cannot_be_recorded_is_one_line(kvlock, here, clip, model, options, message):
    where = ["--video", clip.video, "--mask", clip.mask, "--model", model, "--source-prompt", "a star"]
    code, out, err = kvlock("record", *where, *options, "--out", "new.kvlock")
    assert (code, out) == (2, []) and message in err[-1]
    assert list(here.iterdir()) == []


def test_a_recording_without_a_video_is_for_attach(kvlock, here):
    pipe = tiny.pipeline()
    masks, config = tiny.masks(pipe), package.KVLockConfig(kappa=2, window=2)
    options = {"config": config, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with package.record(pipe, "bare.kvlock", tiny.source_latents(), masks, **options):
        tiny.call(pipe, steps=4)
    assert Recording("bare.kvlock").inputs == {}
    code, _, err = kvlock("edit", "--source", "bare.kvlock", "--prompt", "a")
    wanted = "bare.kvlock was not made by kvlock record, and does not hold all that an edit needs"
    assert code == 2 and err[-1].endswith(wanted)


def test_rows_and_place_reach_the_store(kvlock, here, clip, model):
    where = ["--video", clip.video, "--mask", clip.mask, "--model", model, "--source-prompt", "a star", "--steps", 4]
    edit = [*where, "--prompt", "a red circle"]
    kept = {}
    for options in (["--rows", "model"], ["--rows", "int8", "--place", "host"], ["--rows", "fp8", "--place", "disk"]):
        assert kvlock("edit", *edit, *options)[0] == 0
        kept[options[1]] = json.loads((here / "kvlock-out/trace.json").read_text())["summary"]["peak_source_bytes"]
    assert kept["int8"] == kept["fp8"] < kept["model"] / 2
    assert kvlock("record", *where, "--rows", "int8", "--out", "packed.kvlock")[0] == 0
    assert Recording("packed.kvlock").fields["rows"] == {"dtype": "int8", "k_mean": True}
    assert kvlock("edit", "--source", "packed.kvlock", "--prompt", "a red circle")[0] == 0


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"fps": "24"}, "says fps='24', which kvlock record does not write"),
        ({"fps": 0.0}, "says fps=0.0, which"),
        ({"dtype": "torch.float32"}, "says dtype='torch.float32', which"),
        ({"model": 3}, "says model=3, which"),
        ({}, "has frames of torch.float32; wanted torch.uint8"),
    ],
)
def test_a_recording_of_another_maker_is_one_line(kvlock, here, about, message):
    edits = package.KVLockPipeline(tiny.miniature(), package.KVLockConfig(kappa=1, fusion=0.5))
    video = torch.rand(tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    about = {"fps": 8.0, "dtype": "float32", "model": None} | about
    call = {"num_inference_steps": 3, "source_prompt": "a star", "generator": torch.Generator().manual_seed(0)}
    edits.record("other.kvlock", video, tiny.pixel_mask(), about=about, **call)
    code, out, err = kvlock("edit", "--source", "other.kvlock", "--prompt", "a circle")
    assert (code, out) == (2, []) and message in err[-1]
