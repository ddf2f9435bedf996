"""How the cost of the lock grows with tokens, layers, background and kappa: predicted lines, and what was measured."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import attention, roofline
from benchmarks._case import NAMES, WAN_1_3B_480P, Rates, Shape, background_rows
from benchmarks._edit_model import SIZES, seconds
from benchmarks._edit_rows import EditRow
from benchmarks._model import predict
from benchmarks._modes import HALF, MODES, USUAL
from benchmarks.lerp import RATIO, SHARE, traffic
from benchmarks.roofline import Line
from kvlock.config import DEFAULT_KAPPA, KVLockConfig
from kvlock.cost import Cost, estimate
from kvlock.plots import BLUE, DARK_RED, GREY, ORANGE
from kvlock.store import Store

WAN_1_3B = SIZES["1.3b"]
LAYERS = range(1, WAN_1_3B.layers + 1)
LOCKED_LAYERS = {mode: len(MODES[mode].config_of(WAN_1_3B.layers).layers or LAYERS) for mode in (USUAL, HALF)}
STORED = {torch.bfloat16: BLUE, torch.int8: ORANGE}
TOKENS = [2048 * 2**step for step in range(6)]
SHARES = [step / 20 for step in range(1, 21)]
STEPS = 50
KAPPAS = [step / STEPS for step in range(1, STEPS + 1)]
EDITED = {USUAL: BLUE, "store, fused": ORANGE, "batch, hooks": DARK_RED}
LERPS = {"kv_lerp_pair_": 2, "kv_lerp_": 1}  # tensors that a call mixes


def figure(lines: list[Line], edits: Sequence[EditRow], gpu: Rates, name: str) -> Figure:
    """Five panels, each with the rest as it is for Wan2.1-1.3B at 832x480 and 81 frames."""
    rows = [edit for edit in edits if edit.model == "wan-1.3b, random"]
    drawing = Figure(figsize=(12, 6.4), layout="constrained")
    drawing.suptitle(f"Lines are predicted; points are measured on {name}", fontsize=9)
    tokens, share, kappa, memory, layers, empty = drawing.subplots(2, 3).flat
    empty.remove()
    over_tokens(tokens, lines, gpu)
    over_share(share, lines, gpu)
    over_kappa(kappa, rows, gpu)
    kept_over_layers(memory, rows)
    over_layers(layers, rows, gpu)
    for axes in drawing.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=7)
    return drawing


def over_tokens(axes: Axes, lines: list[Line], gpu: Rates) -> None:
    """Locked attention over plain attention by the kernel that serves it, with as many heads."""
    for source, colour in STORED.items():
        times = []
        for n in TOKENS:
            shape = Shape("", (1, 1, n), WAN_1_3B_480P.heads)
            case, plain = attention.case(shape, source), attention.plain_case(shape)
            times.append(predict(case, "kvlock", gpu).us / predict(plain, "SDPA cuDNN", gpu).us)
        axes.plot(TOKENS, times, color=colour, linewidth=1.2, label=f"predicted, rows in {NAMES[source]}")
    for source, colour in STORED.items():
        points = []
        for line in roofline.latest(lines):
            case_ = roofline.BY_KEY.get((line.op, line.shape, line.source, line.setting))
            if case_ is None or line[:2] != ("kv_lerp_attention_", "kvlock") or line.source != NAMES[source]:
                continue
            if (case_.shape.heads, case_.shape.dim) != (WAN_1_3B_480P.heads, WAN_1_3B_480P.dim):
                continue
            alone = roofline.beside(lines, line, "attention", attention.serving(case_.shape), "", "no rows")
            if alone is not None:
                points.append((case_.shape.tokens, (line.measured or 0) / (alone.measured or 1)))
        _points(axes, points, colour, f"measured, {NAMES[source]}")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TOKENS, [str(n) for n in TOKENS], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("attention, locked / plain, same kernel")


def over_share(axes: Axes, lines: list[Line], gpu: Rates) -> None:
    """The lerp of keys and values of one layer, or of one of them where that is measured at more shares."""
    found = {op: {source: _at_shares(lines, op, NAMES[source]) for source in STORED} for op in LERPS}
    op = max(LERPS, key=lambda op: len({share for points in found[op].values() for share, _ in points}))
    for source, colour in STORED.items():
        setting: dict[str, Any] = {"source": source, "ratio": RATIO, "tensors": LERPS[op]}
        times = [traffic(WAN_1_3B_480P, share=share, **setting).predicted_us(gpu) for share in SHARES]
        axes.plot(SHARES, times, color=colour, linewidth=1.2, label=f"predicted, rows in {NAMES[source]}")
        _points(axes, found[op][source], colour, f"measured, {NAMES[source]}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("background share")
    axes.set_ylabel(f"{op}, one layer (us)")


def _at_shares(lines: list[Line], op: str, source: str) -> list[tuple[float, float]]:
    """Share and time of the rows of one lerp at the usual ratio."""
    points = []
    for line in roofline.latest(lines):
        setting = re.fullmatch(rf"share (\S+), ratio {RATIO:g}", line.setting)
        if setting and line[:4] == (op, "kvlock", WAN_1_3B_480P.name, source):
            points.append((float(setting[1]), line.measured or 0))
    return points


def kept_over_layers(axes: Axes, rows: Sequence[EditRow]) -> None:
    """Keys and values that an edit keeps."""
    tokens, background = sizes(rows)
    for name, store, colour in (("bf16", Store(), BLUE), ("int8", Store("int8"), ORANGE)):
        kept = [cost(first(n), tokens, background, store).bytes_kept / 2**30 for n in LAYERS]
        axes.plot(LAYERS, kept, color=colour, linewidth=1.2, label=f"predicted, rows in {name}")
    points = [(LOCKED_LAYERS[row.mode], float(row.source_gib)) for row in rows if row.mode in LOCKED_LAYERS]
    _points(axes, points, BLUE, "measured, bf16")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("locked layers")
    axes.set_ylabel("source rows kept (GiB)")


def over_layers(axes: Axes, rows: Sequence[EditRow], gpu: Rates) -> None:
    """A whole edit over the plain pipeline with the first layers locked; a stored source runs those alone."""
    tokens, background = sizes(rows)
    for mode, colour in EDITED.items():
        modes = [MODES[mode]._replace(config=first(n, MODES[mode].config)) for n in LAYERS]
        ratios = [seconds("1.3b", locks, background / tokens, gpu).edit_ratio for locks in modes]
        axes.plot(LAYERS, ratios, color=colour, linewidth=1.2, label=f"predicted, {mode}")
        points = [(LOCKED_LAYERS[USUAL], float(row.edit_ratio)) for row in rows if row.mode == mode]
        if mode == USUAL:
            points += [(LOCKED_LAYERS[HALF], float(row.edit_ratio)) for row in rows if row.mode == HALF]
        _points(axes, points, colour, f"measured, {mode}")
    axes.set_ylim(bottom=1)
    axes.set_xlabel("locked layers, the first ones")
    axes.set_ylabel("edit / plain pipeline")


def over_kappa(axes: Axes, rows: Sequence[EditRow], gpu: Rates) -> None:
    """A whole edit over the plain pipeline; with a lock by variance its first two steps have none."""
    tokens, background = sizes(rows)
    for mode, colour in EDITED.items():
        step = seconds("1.3b", MODES[mode], background / tokens, gpu)
        ratios = [1 + _locked_share(kappa) * (step.locked / step.plain - 1) for kappa in KAPPAS]
        axes.plot([0, *KAPPAS], [1, *ratios], color=colour, linewidth=1.2, label=f"predicted, {mode}")
        points = [(DEFAULT_KAPPA, float(row.edit_ratio)) for row in rows if row.mode == mode]
        _points(axes, points, colour, f"measured, {mode}")
    axes.set_xlabel("kappa, the share of locked steps")
    axes.set_ylabel("edit / plain pipeline")


def _locked_share(kappa: float) -> float:
    return len(KVLockConfig(kappa=kappa).locked_steps(STEPS)) / STEPS


def sizes(rows: Sequence[EditRow]) -> tuple[int, int]:
    """Tokens and background of the edits measured; before that, of the share of the operators' rows."""
    if rows:
        return int(rows[0].tokens), int(rows[0].background)
    return WAN_1_3B_480P.tokens, background_rows(WAN_1_3B_480P, SHARE)


def first(layers: int, config: KVLockConfig | None = None) -> KVLockConfig:
    """These settings for so many layers, from the first on."""
    return dataclasses.replace(config or KVLockConfig(), layers=tuple(range(layers)))


def cost(config: KVLockConfig, tokens: int, background: int, store: Store) -> Cost:
    return estimate(WAN_1_3B, config, tokens=tokens, background_rows=background, store=store)


def _points(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, label=label)
