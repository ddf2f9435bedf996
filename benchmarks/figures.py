"""Pictures of results and predictions: `python -m benchmarks.figures [results.csv]` writes them beside the file."""

import argparse
import hashlib
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import _edit_rows, growth, roofline
from benchmarks._case import WAN_1_3B_480P, Rates
from benchmarks._harness import read
from benchmarks._model import predict
from benchmarks.lerp import LOCK, is_usual
from benchmarks.roofline import Line
from kvlock.cli.signals import ends_when_unread
from kvlock.plots import BLUE, DARK_RED, GREEN, GREY, ORANGE

OURS = ("kvlock", "kvlock sm_90", "in loop", "one launch", "kvlock in loop, no rows", "one launch, no rows")
KERNELS = ("Triton", "C++")  # of this package too, called without the operator's checks
LINES = {  # of the figure of attention: colour and marker
    "SDPA cuDNN": (BLUE, "o"), "SDPA FLASH": (GREY, "s"), "SDPA EFFICIENT": (GREY, "v"), "FlexAttention": (GREEN, "^"),
    "SageAttention": (GREEN, "D"), "kvlock sm_90": (ORANGE, "o"), "kvlock": (DARK_RED, "*"),
}  # fmt: skip


def draw(path: Path) -> list[Path]:
    """Writes the pictures of one file of results.

    Raises:
        ValueError: as `roofline.rates`.
    """
    assumed = roofline.rates(path)
    gpu = read(path)[0].gpu
    measured = roofline.measured(path)
    lines = roofline.latest(measured)
    edits = [edited.row for edited in _edit_rows.latest(_edit_rows.beside(path))]
    figures = {
        "limit": limit(lines, assumed, gpu),
        "attention": attention(lines, assumed, gpu),
        "growth": growth.figure(measured, edits, assumed, gpu),
    }
    pictures = {path.with_name(f"{path.stem}-{name}.png"): figure for name, figure in figures.items()}
    for picture, figure in pictures.items():
        figure.savefig(picture, dpi=100, metadata={"Rows": rows_of(path)})
    return [*pictures]


def rows_of(path: Path) -> str:
    """The hash of the files that the pictures of one of them are drawn from; each picture has it among its texts."""
    files = (file for file in (path, _edit_rows.beside(path)) if file.exists())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def limit(lines: list[Line], gpu: Rates, name: str) -> Figure:
    """How near each provider comes to the fewest bytes or to the FLOP of its case, and where it was predicted to be.

    Cases with another share or ratio than the usual one are left out.
    """
    bars = []
    for line in lines:
        case = roofline.BY_KEY.get((line.op, line.shape, line.source, line.setting))
        if case is not None and line.shape == WAN_1_3B_480P.name and line.predictable and is_usual(line.setting):
            bars.append((line, predict(case, "", gpu).us))
    bars.sort(key=lambda bar: (bar[0].op, bar[0].source, bar[0].setting, bar[0].measured))
    figure = Figure(figsize=(8, 1 + 0.17 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = [ORANGE if line.provider in (*OURS, *KERNELS) else BLUE for line, _ in bars]
    axes.barh(range(len(bars)), [100 * least / (line.measured or 1) for line, least in bars], color=colours)
    predicted = [100 * least / line.prediction.us for line, least in bars]
    axes.plot(predicted, range(len(bars)), "|", color="black", markersize=8)
    axes.set_yticks(range(len(bars)), [label(line) for line, _ in bars], fontsize=6)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 105)
    axes.set_xlabel(
        f"% of the limit: time at {gpu.bandwidth / 1e12:g} TB/s or {gpu.products / 1e12:g} TFLOP/s over time taken"
    )
    axes.set_title(f"{WAN_1_3B_480P.name}, {name}\norange: this package; |: predicted", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def label(line: Line) -> str:
    """A bar's name and its time."""
    name = " ".join(filter(None, (line.op, line.source, line.setting.split(",")[0])))
    return f"{name} · {line.provider}, {line.measured:.0f} us"


def attention(lines: list[Line], gpu: Rates, name: str) -> Figure:
    """Rates of plain attention, and of the locked one with rows in int8, over the tokens; 12 heads of 128."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    found: dict[str, dict[int, float]] = {provider: {} for provider in LINES}
    for line in lines:
        case = roofline.BY_KEY.get((line.op, line.shape, line.source, line.setting))
        if case is None or (case.shape.heads, case.shape.dim) != (12, 128):
            continue
        locked = (line.op, line.source, line.setting) == ("kv_lerp_attention_", "int8", LOCK)
        if line.provider in LINES and (locked or line.op == "attention"):
            rate = case.work(case.shape).amount / (line.measured or 1) / 1e6
            found[line.provider][case.shape.tokens] = rate
    for provider, points in found.items():
        colour, marker = LINES[provider]
        label = "locked, rows in int8" if provider == "kvlock" else provider
        tokens = sorted(points)
        axes.plot(tokens, [points[n] for n in tokens], marker=marker, color=colour, linewidth=1, label=label)
    axes.axhline(gpu.products / 1e12, color="black", linestyle=":", linewidth=1, label="assumed by predictions")
    axes.set_xscale("log")
    axes.set_xticks([4096, 8192, 16384, 32760, 75600], ["4096", "8192", "16384", "32760", "75600"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens; measured on {name}, 12 heads of 128")
    axes.set_ylabel("TFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="results of python -m benchmarks --gpu; by default all")
    for path in parser.parse_args(arguments).csv or roofline.micro_results():
        try:
            print(*draw(path), sep="\n")
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    with ends_when_unread():
        sys.exit(main())
