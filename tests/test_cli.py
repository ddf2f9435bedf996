"""Tests of the command line: what it writes and says."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from kvlock import Store, cli, mini, preset, video
from kvlock.cli import edit, inputs, models, runs
from kvlock.geometry import Geometry
from kvlock.mini import scenes

pytest_plugins = ["command_line"]

EDIT_FILES = ["out.mp4", *edit.BESIDE]


def test_the_example_needs_no_file_and_writes_everything(kvlock, here, model, written):
    code, out, _ = kvlock("edit", "--example", "--model", model, "--steps", 5, "--preset", "fixed-0.5", drawn=True)
    assert code == 0
    assert all(Image.open(path).width > 600 for path in (here / "kvlock-out").glob("*.png"))
    assert written(here) == sorted(f"kvlock-out/{name}" for name in [*EDIT_FILES, *edit.BESIDE_EXAMPLE])
    scene = scenes.sample(10**6 + inputs.EXAMPLE_SCENE)
    trace = json.loads((here / "kvlock-out/trace.json").read_text())
    assert trace["input"]["source_prompt"] == scene.caption
    assert trace["input"]["prompt"] == runs.another(scene).caption
    assert [row["locked"] for row in trace["steps"]] == [False, False, False, True, True]
    assert trace["summary"]["background_rows"] > 0
    tiny.assert_locked(trace["steps"], preset("fixed-0.5"))
    assert trace["summary"]["composite"] == "none"
    assert set(trace["summary"]["background"]) == {"fixed-0.5", "plain", "vae_round_trip"}
    edited, plain = (video.read_video(here / "kvlock-out" / name).frames for name in ("out.mp4", "plain.mp4"))
    assert edited.shape == plain.shape == (17, 96, 96, 3)
    assert "composite   none" in out
    assert "lock        locked 2 of 5 steps" in out
    assert out[0].split() == ["wrote", "kvlock-out/out.mp4"]


def test_files_of_an_earlier_example_are_kept_and_told_from_the_edit(kvlock, here, model, clip, no_denoising):
    files = ("--video", clip.video, "--mask", clip.mask, "--model", model)
    ours = ("edit", *files, "--prompt", "a star", "--source-prompt", "a circle")
    (here / "kvlock-out").mkdir()
    (here / "kvlock-out/mask.mp4").write_text("the user's own")
    notices = [line for line in kvlock(*ours)[2] if "--example" in line]
    assert notices == [] and (here / "kvlock-out/mask.mp4").read_text() == "the user's own"
    assert not any("--example" in line for line in kvlock("edit", "--example", "--model", model)[2])
    before = {path: path.read_bytes() for path in (here / "kvlock-out").iterdir() if path.name in edit.BESIDE_EXAMPLE}
    code, _, err = kvlock(*ours)
    assert code == 0 and err[-1] == (
        "kvlock: source.mp4, mask.mp4, plain.mp4, comparison.png in kvlock-out are of an earlier edit --example, "
        "not of this edit"
    )
    assert {path: path.read_bytes() for path in before} == before and len(before) == 4
    assert not any("--example" in line for line in kvlock("mask", *files)[2])


def test_the_estimate_foretells_the_run(kvlock, here, model, clip, written):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 5)
    code, out, err = kvlock("estimate", *where)
    assert (code, err) == (0, [])
    assert kvlock("edit", *where, "--prompt", "a red circle", "--source-prompt", "a star")[0] == 0
    trace = json.loads((here / "kvlock-out/trace.json").read_text())
    kept = trace["summary"]["peak_source_bytes"]
    printed = "\n".join(out)
    assert trace["summary"]["forwards"] == 12 and "12 with it (1.20x)" in printed
    assert kept > 0 and f"{kept / 1024:.1f} KiB of source K and V" in printed
    tokens, rows = trace["summary"]["tokens"], trace["summary"]["background_rows"]
    assert f"{tokens} tokens, {rows} of them locked" in printed
    assert written(here) == sorted(f"kvlock-out/{name}" for name in EDIT_FILES)


def test_a_pixel_composite_leaves_the_background_as_it_was(kvlock, here, model, clip):
    where = ("--video", clip.video, "--mask-box", "32,32,64,64", "--model", model, "--steps", 2)
    assert kvlock("edit", *where, "--prompt", "a red circle", "--composite", "pixel", "--out", "o/e.mp4")[0] == 0
    summary = json.loads((here / "o/trace.json").read_text())["summary"]
    assert summary["composite"] == "pixel"
    assert summary["background"]["kv-lock"]["psnr"] == "inf"


def test_options_reach_the_edit(kvlock, here, model, clip, no_denoising, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "ref.png")
    options = ("--seed", 7, "--steps", 9, "--guidance-scale", 3, "--background-guidance", 1, "--composite", "latent")
    options += ("--tau", 0.5, "--rows", "int8", "--place", "host", "--kernel", "backend")
    prompts = ("--prompt", "a", "--source-prompt", "over", "--negative-prompt", "star")
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--reference", tmp_path / "ref.png")
    assert kvlock("edit", *where, *options, *prompts, "--preset", "fixed-0.5")[0] == 0
    (call,) = no_denoising
    assert call.seed == 7
    assert (call.config.fusion, call.config.background_guidance, call.config.composite) == (0.5, 1.0, "latent")
    assert call.config.tau == 0.5
    assert (call.store, call.kernel) == (Store("int8", place="host"), "backend")
    (reference,) = call.settings.pop("reference_images")
    assert (reference.mode, reference.size) == ("RGB", (8, 8))
    assert call.settings == {
        "num_inference_steps": 9,
        "guidance_scale": 3.0,
        "prompt": "a",
        "source_prompt": "over",
        "negative_prompt": "star",
    }
    assert torch.equal(call.source.mask, clip.inside)
    assert (call.source.frames.float() / 255 - clip.frames).abs().mean() < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_vae_stays_in_float32(model, dtype):
    pipe = models.load_pipeline(model, dtype=dtype, device="cpu", offload="none")
    assert pipe.transformer.dtype == getattr(torch, dtype)
    assert pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_model_edits_too(kvlock, here, model, clip, offload):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 3)
    options = ("--prompt", "a red circle", "--source-prompt", "a star", "--preset", "fixed-0.5", "--device", "cpu")
    assert kvlock("edit", *where, *options, "--offload", offload)[0] == 0
    assert kvlock("edit", *where, *options, "--out", "plain/out.mp4")[0] == 0
    tiny.assert_locked(json.loads((here / "kvlock-out/trace.json").read_text())["steps"], preset("fixed-0.5"))
    assert (here / "kvlock-out/out.mp4").read_bytes() == (here / "plain/out.mp4").read_bytes()


@pytest.mark.parametrize("offload, hook", [("model", "_hf_hook"), ("group", "_diffusers_hook"), ("none", None)])
def test_the_kind_of_offload_asked_for_is_the_one_that_is_set_up(model, offload, hook):
    pipe = models.load_pipeline(model, dtype="float32", device="cpu", offload=offload)
    layers = list(pipe.text_encoder.modules())
    found = {name for name in ("_hf_hook", "_diffusers_hook") if any(hasattr(layer, name) for layer in layers)}
    assert found == ({hook} if hook else set())


def test_the_time_is_that_of_the_edit_alone(kvlock, here, model, no_denoising, monkeypatch):
    at_once, clock = runs.denoise, [0.0]

    def slow(pipe, config, *args, **options):
        clock[0] += 60 if config.passthrough else 5  # the plain edit beside it takes longer
        return at_once(pipe, config, *args, **options)

    monkeypatch.setattr(runs, "denoise", slow)
    monkeypatch.setattr(edit, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    code, out, _ = kvlock("edit", "--example", "--model", model)
    assert code == 0
    assert json.loads((here / "kvlock-out/trace.json").read_text())["summary"]["seconds"] == 5
    assert out[-1] == "time        5.0 s for this edit, text encoder and VAE included: 0 rows through the transformer"


def test_one_seed_gives_one_edit_and_another_seed_another(kvlock, here, model, clip):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 2, "--prompt", "a star")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert kvlock("edit", *where, "--seed", seed, "--out", f"{name}/out.mp4")[0] == 0
    first, again, other = ((here / name / "out.mp4").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_a_frame_that_only_vace_s_own_sampling_takes_for_masked_is_not_locked(model):
    known = models.describe(model)
    mask = torch.zeros(17, 96, 96, dtype=torch.bool)
    mask[5, :32, :32] = True  # in the window of latent 2; VACE reads this frame for latent 1
    masks = inputs.build_masks(inputs.Source(torch.zeros(17, 96, 96, 3), mask, 8.0), known)
    assert masks.tokens.any(dim=(1, 2)).tolist() == [False, True, True, False, False]


def test_the_mask_command_tints_the_locked_tokens(kvlock, here, model, clip):
    code, out, err = kvlock("mask", "--video", clip.video, "--mask-box", "64,64,96,96", "--model", model)
    assert (code, err) == (0, [])
    # 16-pixel tokens: the box takes 4 of 36 a frame, its dilation 9.
    assert out[-1] == "locked   54 of 72 tokens (75%)"
    drawn = video.read_video(here / "kvlock-out/locked.mp4").frames.float() / 255
    change = (drawn - clip.frames).abs().mean(dim=(0, 3))
    assert change[52:, 52:].mean() < 0.02
    assert change[:44, :44].min() > 0.05


def test_trimming_says_how_many_frames_it_dropped(kvlock, here, model, tmp_path, no_denoising):
    for number in range(7):
        Image.new("RGB", (96, 96), (20 * number, 90, 90)).save(tmp_path / f"in{number}.png")
    (tmp_path / "frames").mkdir()
    for path in tmp_path.glob("in*.png"):
        path.rename(tmp_path / "frames" / path.name)
    where = ("--video", tmp_path / "frames", "--mask-box", "32,32,64,64", "--model", model, "--prompt", "a star")
    code, _, err = kvlock("edit", *where)
    assert code == 2
    assert err[-1] == (
        "kvlock: error: 7 frames do not fit 4n+1; the nearest counts that do are 5 and 9; --trim drops the last 2"
    )
    code, _, err = kvlock("edit", *where, "--trim")
    assert code == 0
    assert "kvlock: --trim dropped the last 2 of 7 frames" in err
    assert len(no_denoising[0].source.frames) == len(no_denoising[0].source.mask) == 5
    assert no_denoising[0].source.frames[-1, 0, 0, 0] == 80


def test_a_length_without_a_model_s_stride_is_left_alone():
    source = inputs.Source(torch.zeros(9, 32, 32, 3, dtype=torch.uint8), torch.ones(9, 32, 32, dtype=torch.bool), 8.0)
    assert inputs.fit(source, Geometry(4, 8), trim=True) is source


def test_words_the_miniature_does_not_know_are_named_once(kvlock, here, model, clip, no_denoising, monkeypatch):
    monkeypatch.setattr(mini, "PATH", Path(model))
    monkeypatch.setattr(mini, "load", lambda: WanVACEPipeline.from_pretrained(model))
    where = ("--video", clip.video, "--mask", clip.mask, "--source-prompt", "a red star")
    _, _, err = kvlock("edit", *where, "--prompt", "a Red cat over a striped sofa, a cat")
    warnings = [line for line in err if "does not know" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("kvlock: warning: the miniature does not know cat, sofa; it knows a, an, background")
    assert not any("pad" in line or "unk" in line for line in warnings)
    _, _, err = kvlock("edit", *where, "--prompt", "a Red circle")
    assert not any("does not know" in line for line in err)


def test_without_a_source_prompt_there_is_a_notice(kvlock, here, model, clip):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--prompt", "a star", "--steps", 3)
    notices = lambda *more: [line for line in kvlock("edit", *where, *more)[2] if "no source prompt" in line]
    assert len(notices()) == 1
    assert notices("--source-prompt", "a") == notices("--preset", "plain") == []


def test_a_cut_out_reference_is_laid_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(tmp_path / "ref.png", exif=exif)
    (reference,) = runs.read_references(SimpleNamespace(reference=[str(tmp_path / "ref.png")]))
    assert (reference.mode, reference.size, reference.getpixel((0, 0))) == ("RGB", (4, 8), (255, 255, 255))


def test_a_warning_under_the_progress_bar_has_a_line_of_its_own(kvlock, here, model):
    where = ("--example", "--model", model, "--steps", 2, "--preset", "kv-only")
    code, out, err = kvlock("edit", *where)
    assert code == 0 and "lock        locked 0 of 2 steps" in out
    assert any(line.startswith("kvlock: warning: ") for line in "\n".join(err).replace("\r", "\n").splitlines())


def test_another_scene_differs_in_shape_and_colour_only():
    for seed in range(20):
        scene = scenes.sample(seed)
        other = runs.another(scene)
        assert other.shape != scene.shape and other.colour != scene.colour
        assert (other.start, other.speed, other.tones) == (scene.start, scene.speed, scene.tones)


def test_the_version_is_printed(kvlock):
    from kvlock import __version__

    assert kvlock("--version") == (0, [f"kvlock {__version__}"], [])


@pytest.mark.parametrize("argv", [(), ("nonsense",)])
def test_without_a_command_there_is_one_line(kvlock, argv):
    code, out, err = kvlock(*argv)
    assert (code, out, len(err)) == (2, [], 1)


def test_help_waits_for_no_heavy_import():
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    assert name.split(".")[0] not in ("torch", "diffusers", "numpy", "matplotlib"), path
                    assert not name.startswith("kvlock") or name.startswith("kvlock.cli"), path
