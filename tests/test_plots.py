"""Tests of the pictures: what they show is read back from the axes, and every run can be drawn."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from kvlock import plots
from kvlock.config import KVLockConfig


def trace(num_steps=10, samples=1, **changes):
    window = KVLockConfig().locked_steps(num_steps or 1)
    steps = [
        {
            "step": k,
            "in_window": k in window,
            "variance_masked": [0.04 / (k or float("inf"))] * samples,
            "variance_global": [0.01 / (k or float("inf"))] * samples,
            "fusion_ratio": [0.5 if k in window else 0.0] * samples,
            "guidance_scale": [7.0 if k in window else 5.0] * samples,
            "s_star": [0.9] * samples,
            "source_bytes": 3 * 2**20 if k in window else 0,
        }
        | changes
        for k in range(num_steps)
    ]
    return {"version": 1, "config": KVLockConfig().to_dict(), "steps": steps, "summary": {}}


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved so far."""
    figures = []
    save = Figure.savefig

    def record(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_variance_plot_shows_both_variances_tau_and_the_window(tmp_path, drawn):
    plots.plot_variance(trace(), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    masked, whole, tau = (lines(axes)[name] for name in ("inside the mask", "whole video", "τ = 0.01"))
    assert masked.get_ydata()[1:].tolist() == pytest.approx([0.04 / k for k in range(1, 10)])
    assert whole.get_ydata()[1:].tolist() == pytest.approx([0.01 / k for k in range(1, 10)])
    assert math.isnan(masked.get_ydata()[0]) and math.isnan(whole.get_ydata()[0])  # no variance of one entry
    assert masked.get_linewidth() > whole.get_linewidth()
    assert list(tau.get_ydata()) == [0.01, 0.01]
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (5.5, 9.5)


def test_the_schedule_plot_shows_alpha_omega_and_s_star(tmp_path, drawn):
    plots.plot_schedule(trace(), tmp_path / "a.png")
    last = {axes.get_ylabel().split()[-1]: axes.get_lines()[0].get_ydata()[-1] for axes in drawn[0].axes}
    assert last == {"α": 0.5, "ω": 7.0, "s*": 0.9}


def test_the_bytes_plot_averages_over_the_steps_that_keep_something(tmp_path, drawn):
    plots.plot_source_bytes(trace(), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    (mean,) = axes.get_lines()
    assert list(mean.get_ydata()) == [3.0, 3.0]
    assert axes.get_ylabel() == "source K and V (MiB)"
    assert [bar.get_height() for bar in axes.containers[0]] == [0.0] * 6 + [3.0] * 4


def said(recwarn):
    """Warnings of the test: files that others have left open may be collected in it."""
    return [str(warning.message) for warning in recwarn if not issubclass(warning.category, ResourceWarning)]


@pytest.mark.parametrize("draw", [plots.plot_variance, plots.plot_schedule, plots.plot_source_bytes])
@pytest.mark.parametrize(
    "run",
    [
        trace(0),
        trace(1),
        trace(samples=2),
        trace(in_window=False, source_bytes=0),
        trace(variance_masked=[0.0], variance_global=[0.0]),
        trace(s_star=[None], fusion_ratio=[float("nan")]),
    ],
    ids=["no-steps", "one-step", "two-samples", "no-window", "no-variance", "gaps"],
)
def test_every_run_can_be_drawn(tmp_path, draw, run, recwarn):
    draw(run, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
    assert said(recwarn) == []


def sheet_parts():
    source = torch.rand(9, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(9, 16, 24, dtype=torch.bool)
    mask[:, 4:8, 4:12] = True
    edit = source.clone()
    edit[mask] = 0
    edit[:, 12, 20] = 1 - edit[:, 12, 20]
    mask[4, 2, 2], edit[4, 2, 2] = True, 1 - source[4, 2, 2]
    return source, mask, edit


def test_the_sheet_shows_source_and_edits_at_the_same_evenly_spaced_frames(tmp_path, drawn):
    source, mask, edit = sheet_parts()
    plots.contact_sheet(source, {"edit": edit}, mask, tmp_path / "a.png", columns=3)
    shown = [axes.images[0].get_array() for axes in drawn[0].axes if axes.images]
    wanted = [(video[frame] * 255).round().to(torch.uint8) for video in (source, edit) for frame in (0, 4, 8)]
    for cell, want in zip(shown[:6], wanted, strict=True):
        assert torch.equal(torch.tensor(cell), want)
    assert [text.get_text() for text in drawn[0].texts] == ["source", "edit"]


def test_the_sheet_shows_the_background_error_and_nothing_of_the_inside(tmp_path, drawn):
    source, mask, edit = sheet_parts()
    plots.contact_sheet(source, {"edit": edit}, mask, tmp_path / "a.png", columns=3)
    error = drawn[0].axes[-1].images[0].get_array()
    assert error.mask[4:8, 4:12].all() and error.mask.sum() == 32
    assert float(error[12, 20]) == pytest.approx(float((source - edit)[:, 12, 20].abs().mean()), abs=3 / 255)
    assert float(error.sum()) == pytest.approx(float(error[12, 20]))


def test_a_perfect_edit_can_be_drawn(tmp_path, recwarn):
    source, mask, _ = sheet_parts()
    plots.contact_sheet(source, {"edit": source}, mask, tmp_path / "a.png")
    assert said(recwarn) == []


def test_a_sheet_of_videos_that_do_not_fit_is_refused(tmp_path):
    source, mask, edit = sheet_parts()
    for wrong in (({"edit": edit[:1]}, mask), ({"edit": edit}, mask[:1]), ({"source": edit}, mask)):
        with pytest.raises(ValueError, match="wanted one shape for all"):
            plots.contact_sheet(source, *wrong, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
