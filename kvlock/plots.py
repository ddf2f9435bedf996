"""Pictures of a run: its trace as plots, its frames as a sheet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kvlock.cost import byte_unit
from kvlock.video import to_uint8

BLUE, ORANGE, GREEN, DARK_RED, GREY = "#1f5fa8", "#e06c1f", "#2b8a4b", "#8b1a1a", "#666666"
SAND = "#f5e9d1"


def plot_variance(trace: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the windowed variance of every step of ``Trace.to_dict()`` on a log axis, with tau and the lock's window."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    tau = trace["config"]["tau"]
    steps = _shade_window(axes, trace)
    # A window of one entry has variance 0 by definition, which a log axis has no place for.
    positive = {name: _series(trace, name) for name in ("variance_masked", "variance_global")}
    positive = {name: np.where(values > 0, values, np.nan) for name, values in positive.items()}
    _lines(axes, steps, positive["variance_global"], "whole video", color=BLUE, linewidth=1.0)
    _lines(axes, steps, positive["variance_masked"], "inside the mask", color=ORANGE, linewidth=2.2)
    axes.axhline(tau, color=DARK_RED, linestyle="--", linewidth=1.2, label=f"τ = {tau:g}")
    axes.set_yscale("log")
    axes.set_ylabel("variance of the clean prediction")
    _finish(axes, trace)
    figure.savefig(path, dpi=150)


def plot_schedule(trace: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the fusion ratio, the guidance scale and s* of every step of ``Trace.to_dict()``, one above the other."""
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, label, colour) in zip(
        panels,
        (
            ("fusion_ratio", "fusion ratio α", ORANGE),
            ("guidance_scale", "guidance scale ω", BLUE),
            ("s_star", "optimised scale s*", GREEN),
        ),
        strict=True,
    ):
        steps = _shade_window(axes, trace)
        _lines(axes, steps, _series(trace, name), "", color=colour, linewidth=2.0, drawstyle="steps-mid")
        axes.set_ylabel(label)
        _finish(axes, trace, label_steps=axes is panels[-1], legend=axes is panels[0])
    panels[0].set_ylim(-0.05, 1.05)
    figure.savefig(path, dpi=150)


def plot_source_bytes(trace: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the bytes of source K and V kept at every step of ``Trace.to_dict()``, and the mean of the locked steps."""
    figure = Figure(figsize=(7, 3.0), layout="constrained")
    axes = figure.add_subplot()
    kept = np.array([row["source_bytes"] for row in trace["steps"]], dtype=float)
    unit, name = byte_unit(kept.max(initial=0.0))
    steps = _shade_window(axes, trace)
    axes.bar(steps, kept / unit, width=0.8, color=BLUE, label="kept for the step")
    if kept.any():
        mean = kept[kept > 0].mean() / unit
        axes.axhline(mean, color=DARK_RED, linewidth=1.4, label=f"mean of the locked steps {mean:.3g} {name}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"source K and V ({name})")
    _finish(axes, trace)
    figure.savefig(path, dpi=150)


def contact_sheet(
    source: Tensor,
    edits: Mapping[str, Tensor],
    mask: Tensor,
    path: str | os.PathLike[str],
    *,
    title: str = "source",
    columns: int = 6,
) -> None:
    """Draw the source with its mask, and below it each edit, as rows of evenly spaced frames under a label.

    The last column of an edit is its background error: the absolute difference from the source, averaged over channels
    and over the frames in which a pixel lies outside the mask, on one colour scale for all edits.

    Args:
        source: [F, H, W, 3], uint8 or floating point in 0..1.
        edits: label -> frames like `source`.
        mask: bool [F, H, W], True = edit; outlined in the first row.
        path: the picture to write.
        title: label of the first row.
        columns: number of frames in a row, at most F.

    Raises:
        ValueError: the shapes differ, or as `video.to_uint8`.
    """
    videos = {title: to_uint8(source).cpu()} | {label: to_uint8(frames).cpu() for label, frames in edits.items()}
    original, mask = videos[title], mask.cpu()
    shapes = {tuple(frames.shape) for frames in videos.values()}
    if len(videos) != len(edits) + 1 or len(shapes) != 1 or mask.shape != original.shape[:3]:
        raise ValueError(
            f"cannot lay out videos of shapes {sorted(shapes)} with a mask of shape {list(mask.shape)}; "
            "wanted one shape for all, and labels other than the title"
        )
    num_frames, height, width, _ = original.shape
    chosen = torch.linspace(0, num_frames - 1, min(columns, num_frames)).round().long().tolist()
    errors = {label: _background_error(original, videos[label], mask) for label in edits}
    largest = max([float(error.nan_to_num().quantile(0.995)) for error in errors.values()], default=0.0) or 1 / 255

    sheet = _Sheet(rows=len(videos), columns=len(chosen) + 1, aspect=height / width)
    for row, (label, frames) in enumerate(videos.items()):
        sheet.label(row, label)
        for column, frame in enumerate(chosen):
            axes = sheet.cell(row, column)
            axes.imshow(frames[frame].numpy(), interpolation="lanczos")
            if label == title:
                axes.contour(mask[frame].numpy(), levels=[0.5], colors="white", linewidths=1.2)
        last = sheet.cell(row, len(chosen))
        if label == title:
            _error_scale(last, largest)
        else:
            last.imshow(errors[label].numpy(), cmap="magma", vmin=0, vmax=largest)
    sheet.figure.savefig(path, dpi=120)


class _Sheet:
    """A figure of equal cells, sized in inches so that no layout engine moves them; the last column stands apart."""

    SIDE, GAP, APART, LABEL = 1.5, 0.04, 0.12, 0.25

    def __init__(self, *, rows: int, columns: int, aspect: float) -> None:
        self.height = self.SIDE * aspect
        self.columns = columns
        self.size = (
            columns * (self.SIDE + self.GAP) + self.APART,
            rows * (self.height + self.LABEL) + self.GAP,
        )
        self.figure = Figure(figsize=self.size)

    def _top(self, row: int) -> float:
        return self.size[1] - row * (self.height + self.LABEL)

    def label(self, row: int, text: str) -> None:
        x, y = self.GAP / self.size[0], (self._top(row) - 0.6 * self.LABEL) / self.size[1]
        self.figure.text(x, y, text, ha="left", va="center", fontsize=9)

    def cell(self, row: int, column: int) -> Axes:
        left = self.GAP / 2 + column * (self.SIDE + self.GAP) + self.APART * (column == self.columns - 1)
        bottom = self._top(row) - self.LABEL - self.height
        width, height = self.size
        axes = self.figure.add_axes((left / width, bottom / height, self.SIDE / width, self.height / height))
        axes.set_axis_off()
        return axes


def _background_error(source: Tensor, edit: Tensor, mask: Tensor) -> Tensor:
    """[H, W] in 0..1; nan where a pixel is never background."""
    difference = (source.float() - edit.float()).abs().mean(dim=-1) / 255
    return (difference * ~mask).sum(dim=0) / (~mask).sum(dim=0)


def _error_scale(axes: Axes, largest: float) -> None:
    ramp = axes.inset_axes((0.1, 0.28, 0.8, 0.10))
    ramp.imshow(np.linspace(0, 1, 64)[None], cmap="magma", aspect="auto", extent=(0, largest, 0, 1))
    ramp.set_yticks([])
    ramp.set_xticks([0, largest], labels=["0", f"{largest:.2f}"], fontsize=7)
    axes.text(0.5, 0.62, "background\nerror", ha="center", va="center", fontsize=9, transform=axes.transAxes)


def _series(trace: Mapping[str, Any], name: str) -> np.ndarray:
    """[steps, B]; what a step did not record is nan."""
    rows = [row[name] for row in trace["steps"]]
    return np.array(rows, dtype=float).reshape(len(rows), len(rows[0]) if rows else 0)


def _shade_window(axes: Axes, trace: Mapping[str, Any]) -> Sequence[int]:
    """Shade the steps of the window; returns the step numbers."""
    window = [row["step"] for row in trace["steps"] if row["in_window"]]
    if window:
        label = f"the last {len(window)} steps (κ)"
        axes.axvspan(window[0] - 0.5, window[-1] + 0.5, color=SAND, linewidth=0, zorder=0, label=label)
    return [row["step"] for row in trace["steps"]]


def _lines(axes: Axes, steps: Sequence[int], values: np.ndarray, label: str, **style: Any) -> None:
    for sample in range(values.shape[1] if len(steps) else 0):
        axes.plot(steps, values[:, sample], label=label if sample == 0 else None, marker=".", markersize=4, **style)


def _finish(axes: Axes, trace: Mapping[str, Any], *, label_steps: bool = True, legend: bool = True) -> None:
    if not trace["steps"]:
        axes.text(0.5, 0.5, "no steps were recorded", ha="center", va="center", transform=axes.transAxes, color=GREY)
    if label_steps:
        axes.set_xlabel("denoising step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if trace["steps"]:
        axes.set_xlim(-1, trace["steps"][-1]["step"] + 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[1]:
        # Above the axes, where it covers no line and the shade's swatch does not sit on the shade.
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
