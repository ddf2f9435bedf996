"""How the cost of the lock grows with tokens, layers, background and kappa: predicted lines, and what was measured."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import attention, roofline
from benchmarks._case import NAMES, WAN_1_3B_480P, Rates, Shape
from benchmarks._model import predict
from benchmarks.lerp import RATIO, SHARE, traffic
from benchmarks.roofline import Line
from kvlock.config import DEFAULT_KAPPA, KVLockConfig
from kvlock.cost import Cost, ModelSizes, estimate
from kvlock.plots import BLUE, DARK_RED, GREY, ORANGE
from kvlock.store import Store

WAN_1_3B = ModelSizes(layers=30, heads=12, head_dim=128, token_values=64)
STORED = {torch.bfloat16: BLUE, torch.int8: ORANGE}
TOKENS = [2048 * 2**step for step in range(6)]
SHARES = [step / 20 for step in range(1, 21)]
KAPPAS = [step / 10 for step in range(1, 11)]

Edits = Sequence[dict[str, str]]  # rows of whole edits


def edits(path: Path) -> Edits:
    """The edits measured on the GPU of this file of results, if there are any."""
    other = path.with_name(f"edit-{path.name}")
    if not other.exists():
        return ()
    with other.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def figure(lines: list[Line], rows: Edits, gpu: Rates, name: str) -> Figure:
    """Four panels, each with the rest as it is for Wan2.1-1.3B at 832x480 and 81 frames."""
    drawing = Figure(figsize=(9, 6.4), layout="constrained")
    drawing.suptitle(f"Lines are predicted; points are measured on {name}", fontsize=9)
    tokens, share, layers, kappa = drawing.subplots(2, 2).flat
    over_tokens(tokens, lines, gpu)
    over_share(share, lines, gpu)
    over_layers(layers, rows)
    over_kappa(kappa, rows)
    for axes in drawing.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=7)
    return drawing


def over_tokens(axes: Axes, lines: list[Line], gpu: Rates) -> None:
    """Locked attention over plain attention by cuDNN."""
    for source, colour in STORED.items():
        times = []
        for n in TOKENS:
            shape = Shape("", (1, 1, n), WAN_1_3B_480P.heads)
            case, plain = attention.case(shape, source), attention.plain_case(shape)
            times.append(predict(case, "kvlock", gpu).us / predict(plain, "SDPA cuDNN", gpu).us)
        axes.plot(TOKENS, times, color=colour, linewidth=1.2, label=f"predicted, rows in {NAMES[source]}")
    plain_times = {line.shape: line.measured for line in lines if line[:2] == ("attention", "SDPA cuDNN")}
    for source, colour in STORED.items():
        points = []
        for line in lines:
            case_ = roofline.BY_KEY.get((line.op, line.shape, line.source, line.setting))
            named = line[:2] == ("kv_lerp_attention_", "kvlock") and line.source == NAMES[source]
            if case_ is not None and named and plain_times.get(line.shape):
                points.append((case_.shape.tokens, (line.measured or 0) / (plain_times[line.shape] or 1)))
        _points(axes, points, colour, f"measured, {NAMES[source]}")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TOKENS, [str(n) for n in TOKENS], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("attention, locked / plain cuDNN")


def over_share(axes: Axes, lines: list[Line], gpu: Rates) -> None:
    """The lerp of keys and values of one layer."""
    for source, colour in STORED.items():
        times = [
            traffic(WAN_1_3B_480P, share=share, source=source, ratio=RATIO, tensors=2).predicted_us(gpu)
            for share in SHARES
        ]
        axes.plot(SHARES, times, color=colour, linewidth=1.2, label=f"predicted, rows in {NAMES[source]}")
        wanted = ("kv_lerp_pair_", "kvlock", WAN_1_3B_480P.name, NAMES[source])
        points = [(SHARE, line.measured or 0) for line in lines if line[:4] == wanted]
        _points(axes, points, colour, f"measured, {NAMES[source]}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("background share")
    axes.set_ylabel("kv_lerp_pair_, one layer (us)")


def over_layers(axes: Axes, rows: Edits) -> None:
    """Keys and values that an edit keeps."""
    background, tokens = 25515, WAN_1_3B_480P.tokens
    counts = range(1, WAN_1_3B.layers + 1)
    for name, store, colour in (("bf16", Store(), BLUE), ("int8", Store("int8"), ORANGE)):
        kept = [
            cost(KVLockConfig(layers=tuple(range(n))), tokens, background, store).bytes_kept / 2**30 for n in counts
        ]
        axes.plot(counts, kept, color=colour, linewidth=1.2, label=f"predicted, rows in {name}")
    points = [
        (WAN_1_3B.layers, float(row["source_gib"]))
        for row in rows
        if row["mode"] == "store, hooks" and row["background"] == str(background)
    ]
    _points(axes, points, BLUE, "measured, bf16")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("locked layers")
    axes.set_ylabel("source rows kept (GiB)")


def over_kappa(axes: Axes, rows: Edits) -> None:
    """A whole edit over the plain pipeline, by forwards through the transformer."""
    background, tokens = 25515, WAN_1_3B_480P.tokens
    for source, colour in (("store", BLUE), ("batch", DARK_RED)):
        costs = [cost(KVLockConfig(kappa=kappa, source=source), tokens, background, Store()) for kappa in KAPPAS]
        ratios = [each.forwards / each.forwards_plain for each in costs]
        axes.plot([0, *KAPPAS], [1, *ratios], color=colour, linewidth=1.2, label=f"predicted, {source}")
        points = [
            (DEFAULT_KAPPA, float(row["edit_ratio"]))
            for row in rows
            if row["mode"].startswith(source) and row["locked_ratio"]
        ]
        _points(axes, points, colour, f"measured, {source}")
    axes.set_xlabel("kappa, the share of locked steps")
    axes.set_ylabel("edit / plain pipeline")


def cost(config: KVLockConfig, tokens: int, background: int, store: Store) -> Cost:
    return estimate(WAN_1_3B, config, tokens=tokens, background_rows=background, store=store)


def _points(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, label=label)
