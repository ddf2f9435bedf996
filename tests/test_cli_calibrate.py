"""Tests of the command that proposes values for tau."""

import json

import pytest
import torch

from kvlock.cli import calibrate
from kvlock_kernels import lock_schedule

pytest_plugins = ["command_line"]


def words(line):
    """Name, tau, percentile and share of a line of the output."""
    name, tau, _, percentile, _, _, _, share, *_ = line.split()
    return name, float(tau), int(percentile.strip("):")), share


@pytest.mark.parametrize("which", ["model", "v2v_model"])
def test_percentiles_come_from_the_variances_of_the_plain_edit(kvlock, here, clip, written, request, which):
    model = request.getfixturevalue(which)
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 12, "--seed", 3)
    prompts = ("--prompt", "a red circle", "--source-prompt", "a star")
    code, out, err = kvlock("calibrate", *where, *prompts)
    assert code == 0 and not any("error" in line for line in err)
    assert written(here) == []
    assert kvlock("edit", *where, *prompts, "--preset", "plain")[0] == 0
    trace = json.loads((here / "kvlock-out/trace.json").read_text())
    assert trace["summary"]["locked_steps"] == 0
    rows = trace["steps"]
    window = [row["step"] for row in rows if row["in_window"]]
    assert out[0] == f"steps       {len(rows)} without a lock; it would act in the last {len(window)}"
    steering = torch.tensor([rows[step - 1]["variance_masked"][0] for step in window])
    assert len(out) == 7
    for line, percentile in zip(out[2:], (10, 25, 50, 75, 90), strict=True):
        tau = float(torch.quantile(steering.double(), percentile / 100))
        share = (steering.double() >= tau).double().mean().item()
        name, printed, label, full = words(line)
        assert (name, printed, label, full) == ("tau", float(f"{tau:.3g}"), percentile, f"{share:.0%}")


def test_with_two_transformers_the_variances_are_those_of_the_steps_that_an_edit_locks(kvlock, here, clip, two_experts):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", two_experts, "--steps", 20, "--seed", 3)
    prompts = ("--prompt", "a red circle", "--source-prompt", "a star")
    code, out, _ = kvlock("calibrate", *where, *prompts)
    assert code == 0
    assert out[0] == "steps       20 without a lock; it would act in 6 of the last 8"
    rows = {}
    for name in ("plain", "kv-lock"):
        assert kvlock("edit", *where, *prompts, "--preset", name, "--out", f"{name}/out.mp4")[0] == 0
        rows[name] = json.loads((here / name / "trace.json").read_text())["steps"]
    assert [row["expert"] for row in rows["plain"]] == [0] * 15 + [1] * 5
    locked = [row["step"] for row in rows["kv-lock"] if row["locked"]]
    steering = [rows["plain"][step - 1]["variance_masked"][0] for step in locked]
    assert out[1].startswith(f"variance    {min(steering):.3g} to {max(steering):.3g} inside the mask")
    assert [words(line)[1] for line in out[2:]] == [float(f"{tau:.3g}") for _, tau, _ in calibrate.proposals(steering)]


def test_a_full_lock_is_that_of_the_schedule():
    torch.manual_seed(0)
    variances = torch.rand(20) / 100 + 1e-3
    for _, tau, share in calibrate.proposals(variances.tolist()):
        planned = lock_schedule(variances, torch.ones(20), tau=tau * (1 - 1e-6), boost=2.0, alpha_min=0.0)
        assert (planned.fusion_ratio == 1).float().mean() == pytest.approx(share)


def test_without_a_source_prompt_there_is_no_notice_as_no_source_runs(kvlock, here, model, clip):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 4, "--prompt", "a star")
    code, _, err = kvlock("calibrate", *where)
    assert code == 0 and not any("no source prompt" in line for line in err)


def test_a_run_too_short_for_a_window_is_one_line(kvlock, here, model, clip):
    where = ("--video", clip.video, "--mask", clip.mask, "--model", model, "--steps", 2, "--prompt", "a star")
    code, out, err = kvlock("calibrate", *where)
    assert (code, out) == (2, [])
    assert err[-1] == "kvlock: error: the lock would act in none of the 2 steps; wanted more --steps"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "1001"], "--steps 1001 is out of range"),
        (["--seed", str(2**63)], "--seed 9223372036854775808 is out of range"),
        (["--example", "--video", "a.mp4"], "leave out --video"),
        (["--preset", "kv-lock"], "unrecognized arguments: --preset kv-lock"),
    ],
)
def test_bad_input_is_one_line(kvlock, here, model, argv, message):
    code, out, err = kvlock("calibrate", "--model", model, *argv)
    assert (code, out, len(err)) == (2, [], 1) and message in err[0]
