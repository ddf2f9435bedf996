"""Tests of the command line: what it writes, what it refuses in one line, and that a failure leaves nothing behind."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image

from kvlock import cli, mini, video
from kvlock.cli import edit, inputs, outputs
from kvlock.geometry import Geometry
from kvlock.mini import models, scenes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random VACE pipeline on disk, with the miniature's words."""
    torch.manual_seed(0)
    pipe = WanVACEPipeline(
        tokenizer=models.build_tokenizer(),
        text_encoder=models.build_text_encoder(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=models.build_scheduler(),
        transformer=WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=models.TEXT_DIM,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
            vace_layers=[0, 2],
            vace_in_channels=96,
        ),
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(path)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def clip(tmp_path):
    """A video of 5 frames of 96x96 pixels and its mask, as files outside the current folder."""
    scene = scenes.sample(inputs.HELD_OUT)
    frames, mask = scenes.render(scene)[:5], scenes.box_mask(scene)[:5]
    video.write_video(tmp_path / "in.mp4", frames, 8)
    video.write_video(tmp_path / "mask.mp4", mask[..., None].expand_as(frames).float(), 8)
    return SimpleNamespace(video=str(tmp_path / "in.mp4"), mask=str(tmp_path / "mask.mp4"), frames=frames, inside=mask)


@pytest.fixture
def kvlock(capsys):
    """Run the command line: exit code, lines on stdout, lines on stderr."""

    def run(*argv):
        try:
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

    def denoise(pipe, config, source, seed, settings):
        calls.append(SimpleNamespace(pipe=pipe, config=config, source=source, seed=seed, settings=settings))
        trace = SimpleNamespace(
            to_dict=lambda: {"version": 1, "config": config.to_dict(), "steps": [], "summary": {"forwards": 0}}
        )
        masks = SimpleNamespace(num_tokens=1, background_rows=1)
        return SimpleNamespace(frames=torch.full(source.frames.shape, 0.5), trace=trace, masks=masks)

    monkeypatch.setattr(edit, "denoise", denoise)
    return calls


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


EDIT_FILES = ["out.mp4", *edit.BESIDE]


def test_the_example_needs_no_file_and_writes_everything(kvlock, here, model):
    code, out, _ = kvlock("edit", "--example", "--model", model, "--steps", 5)
    assert code == 0
    assert written(here) == sorted(f"kvlock-out/{name}" for name in [*EDIT_FILES, *edit.BESIDE_EXAMPLE])
    scene = scenes.sample(10**6 + inputs.EXAMPLE_SCENE)
    trace = json.loads((here / "kvlock-out/trace.json").read_text())
    assert trace["input"]["source_prompt"] == scene.caption
    assert trace["input"]["prompt"] == edit.another(scene).caption
    assert [row["locked"] for row in trace["steps"]] == [False, False, False, True, True]
    assert trace["steps"][-1]["fusion_ratio"][0] > 0
    assert trace["summary"]["composite"] == "none"
    assert set(trace["summary"]["background"]) == {"kv-lock", "plain", "vae_round_trip"}
    edited, plain = (video.read_video(here / "kvlock-out" / name).frames for name in ("out.mp4", "plain.mp4"))
    assert edited.shape == plain.shape == (17, 96, 96, 3)
    assert "composite   none" in out
    assert out[0].split() == ["wrote", "kvlock-out/out.mp4"]


def test_the_estimate_foretells_the_run(kvlock, here, model, clip):
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
    prompts = ("--prompt", "a", "--source-prompt", "over", "--negative-prompt", "star")
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--reference", tmp_path / "ref.png")
    assert kvlock("edit", *where, *options, *prompts, "--preset", "fixed-0.5")[0] == 0
    (call,) = no_denoising
    assert call.seed == 7
    assert (call.config.fusion, call.config.background_guidance, call.config.composite) == (0.5, 1.0, "latent")
    (reference,) = call.settings.pop("reference_images")
    assert reference.size == (8, 8)
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
    pipe = inputs.load_pipeline(model, dtype=dtype, device="cpu", offload="none")
    assert pipe.transformer.dtype == getattr(torch, dtype)
    assert pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_model_edits_too(kvlock, here, model, clip, offload):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 3)
    prompts = ("--prompt", "a red circle", "--source-prompt", "a star")
    assert kvlock("edit", *where, *prompts, "--device", "cpu", "--offload", offload)[0] == 0
    assert kvlock("edit", *where, *prompts, "--device", "cpu", "--out", "plain/out.mp4")[0] == 0
    assert (here / "kvlock-out/out.mp4").read_bytes() == (here / "plain/out.mp4").read_bytes()


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


def test_without_a_source_prompt_there_is_a_notice(kvlock, here, model, clip, no_denoising):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--prompt", "a star")
    assert any("no --source-prompt" in line for line in kvlock("edit", *where)[2])
    assert not any("no --source-prompt" in line for line in kvlock("edit", *where, "--source-prompt", "a")[2])


BAD_EDITS = {
    "no video": ([], "no video; wanted --video"),
    "no mask": (["--video", "V"], "no mask; wanted --mask"),
    "no prompt": (["--video", "V", "--mask", "M"], "no prompt; wanted --prompt"),
    "missing video": (["--video", "gone.mp4", "--mask", "M"], "gone.mp4 does not exist"),
    "missing mask": (["--video", "V", "--mask", "gone.mp4"], "gone.mp4 does not exist"),
    "unreadable video": (["--video", "TEXT", "--mask", "M"], "as a video"),
    "mask of another size": (["--video", "V", "--mask", "SMALL"], "is 48x48 pixels"),
    "mask of another length": (["--video", "V", "--mask", "SHORT"], "has 1 frames; the video has 5"),
    "empty mask": (["--video", "V", "--mask", "BLACK", "--prompt", "a"], "nothing to edit"),
    "full mask": (["--video", "V", "--mask-box", "0,0,96,96", "--prompt", "a"], "nothing to lock"),
    "box outside": (["--video", "V", "--mask-box", "0,0,97,96"], "leaves the picture"),
    "mask and box": (["--video", "V", "--mask", "M", "--mask-box", "0,0,8,8"], "not allowed with"),
    "example and video": (["--example", "--video", "V"], "leave out --video"),
    "negative example": (["--example", "-1"], "-1"),
    "odd picture": (["--video", "SMALLVIDEO", "--mask-box", "0,0,8,8", "--prompt", "a"], "video height is 40; wanted"),
    "unknown preset": (["--example", "--preset", "nonsense"], "unknown preset 'nonsense'; known presets: kv-lock"),
    "unknown model": (["--example", "--model", "/gone/model"], "model /gone/model does not exist"),
    "no pipeline": (["--example", "--model", "EMPTY"], "no transformer/config.json"),
    "no configuration": (["--example", "--model", "BROKEN"], "is not the configuration of a diffusers model"),
    "unsupported transformer": (["--example", "--model", "FLUX"], "FluxTransformer2DModel is not supported"),
    "weights that do not load": (["--example", "--model", "WEIGHTLESS"], "cannot load model"),
    "unknown device": (["--example", "--device", "abacus"], "device 'abacus' is not available"),
    "no steps": (["--example", "--steps", "0"], "--steps 0 is out of range"),
    "no number": (["--example", "--steps", "few"], "invalid int value"),
    "endless guidance": (["--example", "--guidance-scale", "inf"], "wanted a finite number"),
    "negative guidance outside": (["--example", "--background-guidance", "-1"], "background_guidance=-1.0 is"),
    "unknown option": (["--example", "--nonsense"], "unrecognized arguments: --nonsense"),
    "output that is no video": (["--example", "--out", "out.txt"], "wanted a name that ends in .mp4"),
    "output in place of the trace": (["--example", "--out", "side-by-side.mp4"], "the name of another result"),
    "output under a file": (["--example", "--out", "UNDER"], "is a file"),
    "output over the input": (["--video", "V", "--mask", "M", "--prompt", "a", "--out", "V"], "would be overwritten"),
    "missing reference": (["--example", "--reference", "gone.png"], "cannot read reference gone.png"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, model):
    """Files that are wrong, by the names they have in BAD_EDITS."""
    folder = tmp_path_factory.mktemp("bad")
    names = {name: str(folder / f"{name}.mp4") for name in ("V", "M", "SMALL", "SHORT", "BLACK", "SMALLVIDEO", "TEXT")}
    white = torch.zeros(5, 96, 96, 3)
    white[:, 40:56, 40:56] = 1
    for name, frames in {
        "V": white / 2,
        "M": white,
        "SMALL": white[:, :48, :48],
        "SHORT": white[:1],
        "BLACK": white * 0,
        "SMALLVIDEO": white[:, :40],
    }.items():
        video.write_video(names[name], frames, 8)
    Path(names["TEXT"]).write_text("not a video")
    names["UNDER"] = names["TEXT"] + "/out.mp4"
    for name in ("EMPTY", "BROKEN", "FLUX", "WEIGHTLESS"):
        names[name] = str(folder / name)
        for part in ("transformer", "vae"):
            (folder / name / part).mkdir(parents=True)
            config = (Path(model) / part / "config.json").read_text()
            if name != "EMPTY":
                (folder / name / part / "config.json").write_text("{" if name == "BROKEN" else config)
    flux = {"_class_name": "FluxTransformer2DModel"}
    (folder / "FLUX/transformer/config.json").write_text(json.dumps(flux))
    return names


@pytest.mark.parametrize("case", BAD_EDITS)
def test_bad_input_ends_with_one_line_and_leaves_nothing(kvlock, here, model, bad_inputs, no_denoising, case):
    argv, message = BAD_EDITS[case]
    argv = [bad_inputs.get(a, a) for a in argv]
    if "--model" not in argv:
        argv += ["--model", model]
    before = {path: Path(path).read_bytes() for name, path in bad_inputs.items() if Path(path).is_file()}
    code, out, err = kvlock("edit", *argv)
    errors = [line for line in err if line.startswith("kvlock: error: ")]
    assert code == 2
    assert len(errors) == 1 and message in errors[0]
    assert not any("Traceback" in line or line.startswith("usage") for line in err)
    assert out == [] and not no_denoising
    assert list(here.iterdir()) == []
    assert all(Path(path).read_bytes() == data for path, data in before.items())


def test_references_need_a_vace_model(kvlock, here, model, clip, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ref.png")
    path = tmp_path / "t2v"
    for part in ("transformer", "vae"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text((Path(model) / part / "config.json").read_text())
    (path / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    code, _, err = kvlock("edit", "--example", "--reference", tmp_path / "ref.png", "--model", path)
    assert code == 2 and "--reference needs a VACE model" in err[-1]


def test_a_hub_model_that_cannot_be_fetched_is_one_line(kvlock, here, monkeypatch):
    def offline(*_):
        raise OSError("cannot reach the Hub\nmany\nmore lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    code, _, err = kvlock("estimate", "--example", "--model", "somebody/something")
    assert code == 2
    assert err == [
        "kvlock: error: model somebody/something is no folder, and the Hub does not give its transformer/config.json: "
        "cannot reach the Hub"
    ]


@pytest.mark.parametrize("stage", ["cli.edit.denoise", "plots.plot_schedule", "video.side_by_side"])
def test_ctrl_c_leaves_nothing(kvlock, here, model, no_denoising, monkeypatch, stage):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"kvlock.{stage}", interrupt)
    code, out, err = kvlock("edit", "--example", "--model", model)
    assert (code, out) == (130, [])
    assert err[-1] == "kvlock: error: interrupted"
    assert list(here.iterdir()) == []


def test_a_full_disk_leaves_the_old_results(kvlock, here, model, no_denoising, monkeypatch):
    (here / "kvlock-out").mkdir()
    (here / "kvlock-out/out.mp4").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvlock.plots.contact_sheet", full)
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 2 and "No space left" in err[-1]
    assert written(here) == ["kvlock-out/out.mp4"]
    assert (here / "kvlock-out/out.mp4").read_bytes() == b"old"


def test_an_exhausted_device_is_told_from_a_bug(kvlock, here, model, monkeypatch):
    def fail(message):
        def denoise(*_):
            raise RuntimeError(message)

        monkeypatch.setattr(edit, "denoise", denoise)

    fail("CUDA out of memory. Tried to allocate 20 GiB")
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 1 and err[-1].startswith("kvlock: error: out of memory; try --offload")
    fail("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        kvlock("edit", "--example", "--model", model)


def test_an_unwritable_folder_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot write to folder"):
        outputs.check(tmp_path / "new" / "out.mp4", (), [])


def test_an_estimate_needs_no_video(kvlock, model):
    sizes = ("--frames", 81, "--height", 480, "--width", 832, "--model", model)
    code, out, err = kvlock("estimate", *sizes, "--mask-share", 0.5, "--dtype", "bfloat16")
    assert (code, err) == (0, [])
    assert "32760 tokens, 16380 of them locked" in out[1]
    assert f"{3 * 2 * 16380 * 24 * 2 / 2**20:.1f} MiB of source K and V" in "\n".join(out)
    assert any("100 without KV-Lock" in line for line in out)
    assert kvlock("estimate", *sizes, "--preset", "plain")[1][-1].endswith("nothing is locked")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no video; wanted --video"),
        (["--frames", "17", "--height", "96"], "all of --frames, --height and --width"),
        (["--frames", "16", "--height", "96", "--width", "96"], "the nearest counts that do are 13 and 17"),
        (["--frames", "17", "--height", "90", "--width", "96"], "video height is 90; wanted a multiple of 16"),
        (["--frames", "17", "--height", "96", "--width", "96", "--mask-share", "2"], "--mask-share 2.0 is"),
        (["--example", "--frames", "17"], "leave them out"),
        (["--example", "--preset", "x"], "unknown preset"),
    ],
)
def test_a_bad_estimate_is_one_line(kvlock, model, argv, message):
    code, out, err = kvlock("estimate", *argv, "--model", model)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("kvlock: error: ") and message in err[0]


def test_a_config_without_the_newer_entries_gets_the_defaults_of_its_class(tmp_path, model):
    for part, config in {
        "transformer": {"_class_name": "WanVACETransformer3DModel", "num_layers": 30, "num_attention_heads": 12},
        "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 96},
    }.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    known = inputs.describe(str(tmp_path))
    assert known.geometry == Geometry(4, 8, (1, 2, 2))
    assert (known.sizes.layers, known.sizes.heads, known.sizes.head_dim) == (30, 12, 128)
    assert known.has_vace


def test_another_scene_differs_in_shape_and_colour_only():
    for seed in range(20):
        scene = scenes.sample(seed)
        other = edit.another(scene)
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
