"""Tests of the estimate on the command line, and of the model configurations it reads."""

import json

import pytest

from kvlock import session
from kvlock.cli import models
from kvlock.geometry import Geometry

pytest_plugins = ["command_line"]


@pytest.fixture
def runs(monkeypatch):
    """Every denoising run that is made."""
    made = []

    class Recorded(session.Run):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(session, "Run", Recorded)
    return made


def traced(here):
    return json.loads((here / "kvlock-out/trace.json").read_text())


@pytest.mark.parametrize("preset", ["kv-lock", "plain"])
@pytest.mark.parametrize("steps", [4, 11])
def test_an_estimate_foretells_the_memory_of_the_clean_predictions(kvlock, here, model, clip, runs, steps, preset):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", steps, "--preset", preset)
    printed = kvlock("estimate", *where)[1]
    assert kvlock("edit", *where, "--prompt", "a red circle", "--source-prompt", "a star")[0] == 0
    (run,) = runs
    held = run._guided_history.nbytes + run._cond_history.nbytes
    window = len(run._guided_history)
    line = f"{held / 1024:.1f} KiB of clean predictions in float32: two rings of {window} steps"
    assert [words for words in printed if "clean predictions" in words] == [f"{'':11}{line}"]


@pytest.mark.parametrize("steps, run", [(10, 8), (5, 4), (3, 2)])
def test_an_estimate_foretells_the_share_of_the_steps_that_video_to_video_runs(
    kvlock, here, v2v_model, clip, runs, steps, run
):
    video = ("--video", clip.video, "--mask", clip.mask)
    where = (*video, "--model", v2v_model, "--preset", "fixed-0.5", "--steps", steps)
    code, out, _ = kvlock("estimate", *where)
    assert code == 0
    printed = "\n".join(out)
    code, _, err = kvlock("edit", *where, "--prompt", "a red circle", "--source-prompt", "a star")
    assert code == 0
    summary = traced(here)["summary"]
    assert summary["steps"] == run and summary["locked_steps"] > 0
    acts = f"the lock acts in the last {summary['locked_steps']} "
    assert f"steps      {run} of {steps} (strength 0.8), {acts}" in printed
    assert f"{2 * run} without KV-Lock" in printed
    assert f"{summary['forwards']} with it" in printed
    bars = [line for line in "\n".join(err).replace("\r", "\n").splitlines() if line.startswith("kv-lock")]
    assert f"{run}/{run}" in bars[-1]
    assert len(runs[0]._guided_history) == runs[0].config.window_steps(steps)


@pytest.mark.parametrize("preset, unlocked", [("kv-lock", 2), ("fixed-0.5", 0)])
def test_an_estimate_of_two_transformers_says_that_the_second_starts_without_a_lock(
    kvlock, here, two_experts, clip, preset, unlocked
):
    video = ("--video", clip.video, "--mask", clip.mask)
    where = (*video, "--model", two_experts, "--preset", preset, "--steps", 20)
    printed = "\n".join(kvlock("estimate", *where)[1])
    code, out, _ = kvlock("edit", *where, "--prompt", "a red circle", "--source-prompt", "a star")
    assert code == 0
    summary = traced(here)["summary"]
    assert (summary["locked_steps"], summary["forwards"]) == (8 - unlocked, 48 - unlocked)
    assert f"lock        locked {8 - unlocked} of 20 steps" in out
    but = ", but not in the 2 after a change of transformer" if unlocked else ""
    assert f"steps      20, the lock acts in the last 8{but} (preset {preset})" in printed
    recorded = [line.split("record   ")[1] for line in printed.splitlines() if "kvlock record" in line]
    assert recorded and all(line.startswith("up to ") == bool(unlocked) for line in recorded)
    assert f"           {'up to ' if unlocked else ''}48 with it (1.20x), the source runs once a step" in printed


@pytest.mark.parametrize("command", ["edit", "estimate", "calibrate"])
def test_video_to_video_with_no_step_to_run_is_one_line(kvlock, here, v2v_model, clip, command):
    where = ["--video", clip.video, "--mask", clip.mask, "--model", v2v_model, "--steps", 1]
    prompt = [] if command == "estimate" else ["--prompt", "a star", "--source-prompt", "a"]
    code, out, err = kvlock(command, *where, *prompt)
    assert (code, out) == (2, [])
    message = "--steps 1 leaves none to a pipeline that runs the last 0.8 of them; wanted 2 or more"
    assert err == [f"kvlock: error: {message}"]


def test_an_estimate_needs_no_video(kvlock, model):
    sizes = ("--frames", 81, "--height", 480, "--width", 832, "--model", model)
    code, out, err = kvlock("estimate", *sizes, "--mask-share", 0.25, "--dtype", "bfloat16")
    assert (code, err) == (0, [])
    assert "32760 tokens, 24570 of them locked" in out[1]
    assert f"{3 * 2 * 24570 * 24 * 2 / 2**20:.1f} MiB of source K and V" in "\n".join(out)
    assert any("100 without KV-Lock" in line for line in out)
    assert any("120 with it (1.20x)" in line for line in out)
    assert any("140 with it (1.40x), source='batch'" in line for line in out)
    assert kvlock("estimate", *sizes, "--preset", "plain")[1][-2].endswith("nothing is locked")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no video; wanted --video"),
        (["--frames", "17", "--height", "96"], "all of --frames, --height and --width"),
        (["--frames", "16", "--height", "96", "--width", "96"], "the nearest counts that do are 13 and 17"),
        (["--frames", "17", "--height", "90", "--width", "96"], "video height is 90; wanted a multiple of 16"),
        (["--frames", "17", "--height", "96", "--width", "96", "--mask-share", "2"], "--mask-share 2.0 is"),
        (["--frames", "1" + "0" * 400 + "1", "--height", "96", "--width", "96"], "is out of range; wanted 1 to"),
        (["--frames", "-3", "--height", "96", "--width", "96"], "--frames -3 is out of range; wanted 1 to"),
        (["--example", "--steps", "1001"], "--steps 1001 is out of range; wanted 1 to 1000"),
        (["--example", "--steps", "1" + "0" * 400], "is out of range; wanted 1 to 1000"),
        (["--example", "--frames", "17"], "leave them out"),
        (["--example", "--mask-share", "0.5"], "leave them out"),
        (["--example", "--preset", "x"], "unknown preset"),
        (["--example", "--guidance-scale", "nan"], "--guidance-scale nan is out of range"),
        (["--frames", "17", "--height", "96", "--width", "96", "--mask", "nope.png"], "a mask goes with --video"),
        (["--frames", "17", "--height", "96", "--width", "96", "--mask-box", "0,0,9,9"], "a mask goes with --video"),
    ],
)
def test_a_bad_estimate_is_one_line(kvlock, model, argv, message):
    code, out, err = kvlock("estimate", *argv, "--model", model)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("kvlock: error: ") and message in err[0]


def test_a_config_without_the_newer_entries_gets_the_defaults_of_its_class(tmp_path, model):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanVACEPipeline"}')
    for part, config in {
        "transformer": {"_class_name": "WanVACETransformer3DModel", "num_layers": 30, "num_attention_heads": 12},
        "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 96},
    }.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    known = models.describe(str(tmp_path))
    assert known.geometry == Geometry(4, 8, (1, 2, 2))
    assert (known.sizes.layers, known.sizes.heads, known.sizes.head_dim) == (30, 12, 128)
    assert known.has_vace


def test_an_estimate_covers_every_place_and_a_recording(kvlock, model):
    sizes = ("--frames", 81, "--height", 480, "--width", 832, "--model", model)
    code, out, _ = kvlock("estimate", *sizes, "--mask-share", 0.25, "--dtype", "bfloat16", "--guidance-scale", 1)
    assert code == 0
    mib = 2**20
    layer = 2 * 24570 * 24 * 2  # K and V of one layer in bytes; there are three
    lines = [
        f"--place device  {3 * layer / mib:.1f} MiB on the device",
        f"--place host    {2 * layer / mib:.1f} MiB on the device, {3 * layer / mib:.1f} MiB on the host, "
        f"{7 * layer / mib:.1f} MiB moved in a step",
        f"--place disk    {2 * layer / mib:.1f} MiB on the device, {3 * layer / mib:.1f} MiB on the host, "
        f"{3 * layer / mib:.1f} MiB on disk, {7 * layer / mib:.1f} MiB moved in a step",
        f"kvlock record   {20 * 3 * layer / mib:.1f} MiB on disk, {4 * layer / mib:.1f} MiB moved in a step",
    ]
    at = next(i for i, line in enumerate(out) if line.startswith("memory"))
    assert [line.strip() for line in out[at + 1 : at + 5]] == lines
    assert "in 8 bits (--rows int8 or fp8)" in out[at + 5] and len(out) == at + 12


def test_an_estimate_knows_that_a_full_lock_by_the_backend_keeps_room_for_all_rows(kvlock, model):
    sizes = ("--frames", 81, "--height", 480, "--width", 832, "--model", model, "--mask-share", 0.25)
    where = (*sizes, "--dtype", "bfloat16", "--preset", "full-lock")
    first = lambda *more: next(line for line in kvlock("estimate", *where, *more)[1] if "--place device" in line)
    one_row = 3 * 2 * 24 * 2 / 2**20
    assert f" {24570 * one_row:.1f} MiB on the device" in first()
    assert f" {32760 * one_row:.1f} MiB on the device" in first("--kernel", "backend")
