"""The tables of benchmarks/README.md that are made from results: `python -m benchmarks.report --write` renews them."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks import figures, growth, roofline
from benchmarks._case import RATES, SHAPES, Shape
from benchmarks._harness import Row, read
from benchmarks._model import predict
from benchmarks.edit import MODES
from benchmarks.offline import END, README
from benchmarks.roofline import RESULTS, Line
from kvlock import Store, preset
from kvlock.config import DEFAULT_KAPPA
from kvlock.cost import estimate

H100 = RESULTS / "nvidia-h100-80gb-hbm3.csv"
CPU = RESULTS / "cpu-amd-epyc.csv"
LOCK, PASS = "share 0.8, ratio 0.3", "qk_norm_rope_kv_lerp_"
CAUSES = {  # of the misses of this package's own rows, by operator and provider
    ("kv_lerp_", "kvlock"): "the launch itself: `torch.lerp` on a slice takes as long",
    (PASS, "kvlock"): "not profiled; with the lock the same kernel is where it was predicted",
    ("windowed_variance_", "kvlock"): "a second launch, see above",
    ("guided_velocity", "kvlock"): "two launches that depend on each other, see above",
    ("attention", "kvlock sm_90"): "heads of 64 and 96; rates are assumed for 128, and cuDNN misses too",
    ("attention", "kvlock in loop, no rows"): "not profiled; the loop is the one that mixes",
    ("attention", "one launch, no rows"): "not profiled; one program on each multiprocessor",
    ("kv_lerp_attention_", "in loop"): "loads depend on the row of each token, and nothing prefetches them",
    ("kv_lerp_attention_", "one launch"): "not profiled; its own plain time misses nearly as far",
}
LINK = 50e9  # bytes a second, what pinned copies over PCIe 5 with 16 lanes reach
CPU_TARGETS = {("pack_kv", "bf16"): 0.5, ("pack_kv", "e4m3"): 0.25, ("pack_kv", "int8"): 0.25}


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = [*header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


class Measured:
    """The latest rows of one file, by what they are."""

    def __init__(self, path: Path) -> None:
        self.lines = figures.latest(roofline.measured(path))
        self._times = {line[:5]: line.measured for line in self.lines}

    def time(self, op: str, provider: str, shape: str, source: str, setting: str) -> float | None:
        return self._times.get((op, provider, shape, source, setting))


def cost() -> str:
    """What locking costs on top of what one runs anyway."""
    rows = [*growth.edits(H100)]
    plain = next(row for row in rows if row["mode"] == "pipeline")
    lines: list[tuple[str, ...]] = [
        (
            f"a whole edit: {row['mode']}", f"{float(plain['step_s']):.2f} s a step",
            f"{float(row['step_s']):.2f} s, locked {float(row['locked_step_s']):.2f} s",
            f"**{float(row['edit_ratio']):.2f}**",
            f"{float(row['peak_gib']) - float(plain['peak_gib']):+.1f} GiB", "`python -m benchmarks.edit --gpu`",
        )
        for row in rows
        if row["locked_ratio"] and row["model"] == plain["model"]
    ]  # fmt: skip
    found = Measured(H100)
    for name, shape in (("32760 tokens", "wan-1.3b-480p"), ("4096 tokens", "small-h12")):
        alone = found.time("attention", "SDPA cuDNN", shape, "", "no rows")
        locked = found.time("kv_lerp_attention_", "kvlock", shape, "int8", LOCK)
        lines.append(_pair(f"one attention of {name}, rows in int8", alone, locked, "attention"))
    alone, locked = (
        found.time(PASS, "kvlock", "wan-1.3b-480p", "bf16", setting) for setting in ("without the lock", LOCK)
    )
    lines.append(_pair("one pass of QK norm and RoPE", alone, locked, PASS))
    return markdown(["what runs", "plain", "locked", "over plain", "more memory", "command"], lines)


def _pair(name: str, plain: float | None, locked: float | None, only: str) -> tuple[str, ...]:
    command = f"`python -m benchmarks --gpu --only {only}`"
    if plain is None or locked is None:
        return name, "not yet measured", "not yet measured", "", "", command
    return name, f"{plain / 1e3:.2f} ms", f"{locked / 1e3:.2f} ms", f"**{locked / plain:.2f}**", "", command


def models() -> str:
    """Attention of one layer of each model, plain and locked: measured, or predicted and said so."""
    found = Measured(H100)
    return markdown(
        ["model", "tokens", "heads", "plain, cuDNN", "locked, rows in int8", "over plain", "predicted over plain"],
        (_model(found, shape) for shape in SHAPES),
    )


def _model(found: Measured, shape: Shape) -> tuple[str, ...]:
    cases = (roofline.BY_KEY["attention", shape.name, "", "no rows"], "SDPA cuDNN"), (
        roofline.BY_KEY["kv_lerp_attention_", shape.name, "int8", LOCK], "kvlock"
    )  # fmt: skip
    times = [found.time(case.op, name, shape.name, case.source, case.setting) for case, name in cases]
    assumed = [predict(case, name, RATES["NVIDIA H100"]).us for case, name in cases]
    cells = [
        f"not yet measured (predicted {guess / 1e3:.2f} ms)" if time is None else f"{time / 1e3:.2f} ms"
        for time, guess in zip(times, assumed, strict=True)
    ]
    plain, locked = times
    over = "not yet measured" if plain is None or locked is None else f"{locked / plain:.2f}"
    heads = f"{shape.heads} of {shape.dim}"
    return f"`{shape.name}`", str(shape.tokens), heads, *cells, over, f"{assumed[1] / assumed[0]:.3f}"


def misses() -> str:
    """This package's rows that miss their prediction by more than 20 %, with the cause; the others in one line."""
    lines = Measured(H100).lines
    own = [line for line in lines if line.provider in figures.OURS]
    table = markdown(
        ["row", "by", "shape", "predicted", "measured", "times", "why"],
        (
            (
                " ".join(filter(None, (f"`{line.op}`", line.source, line.setting.split(", ")[0]))),
                line.provider, line.shape,
                f"{line.prediction.us:.1f} us", f"{line.measured:.1f} us", f"{1 + line.missed:.2f}",
                CAUSES[line.op, line.provider],
            )
            for line in own
            if line.flagged
        ),
    )  # fmt: skip
    others: dict[str, list[Line]] = {}
    for line in lines:
        if line.provider not in figures.OURS:
            others.setdefault(line.provider, []).append(line)
    ranges = ", ".join(
        f"{name} {_range([1 + line.missed for line in group])}"
        for name, group in others.items()
        if any(line.flagged for line in group)
    )
    flagged = sum(line.flagged for line in own)
    return f"{table}\n\n{flagged} of {len(own)} own rows. Others, measured over predicted: {ranges}."


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def cpu() -> str:
    """One core: rates only as shares of a copy and of each other, from one run."""
    rows = {(row.op, row.source, row.setting, row.provider): row for row in read(CPU)}
    lines = []
    for (op, source, setting, provider), row in rows.items():
        if provider != "kvlock":
            continue
        others = [rows.get((op, source, setting, name)) for name in ("eager", "torch.compile")]
        target = CPU_TARGETS.get((op, source))
        share = f"{100 * float(row.share_of_copy):.0f} %" if row.library == "extension" else ""
        lines.append(
            (
                f"`{op}` {source} {setting if 'without' in setting else ''}".strip(), row.library, share,
                f"{100 * target:.0f} %" if target else "", *(_over(row, other) for other in others),
            )
        )  # fmt: skip
    some = next(iter(rows.values()))
    table = markdown(
        ["operator", "served by", "of memcpy", "target", "eager over it", "torch.compile over it"], lines
    )
    return f"{some.gpu}; torch {some.torch}.\n\n{table}"


def _over(row: Row, other: Row | None) -> str:
    return "" if other is None else f"{float(other.p50) / float(row.p50):.2g}"


def places() -> str:
    """Whole edits with rows outside the device or recorded beforehand: measured, or predicted and said so."""
    measured = {row["mode"]: row for row in growth.edits(H100) if row["model"] == "wan-1.3b, random"}
    tokens, background = (int(measured["pipeline"][name]) for name in ("tokens", "background"))
    plain = float(measured["pipeline"]["step_s"])
    lines = []
    for name, mode in MODES.items():
        if mode.store == Store() and not mode.recorded:
            continue
        config = preset("kv-lock", kappa=DEFAULT_KAPPA)
        bytes_ = estimate(growth.WAN_1_3B, config, tokens=tokens, background_rows=background, store=mode.store)
        moved = bytes_.bytes_moved_replay if mode.recorded else bytes_.bytes_moved
        forwards = 1 if mode.recorded else bytes_.forwards / bytes_.forwards_plain
        row = measured.get(name)
        lines.append(
            (
                name, f"{bytes_.bytes_kept / 2**30:.1f} GiB", f"{moved / 2**30:.1f} GiB",
                f"{moved / LINK:.2f} s of {(2 if mode.recorded else 3) / 2 * plain:.2f} s",
                f"not yet measured (predicted {forwards:.2f})" if row is None else f"{float(row['edit_ratio']):.2f}",
                "1.03" if mode.recorded else "1.22",
            )
        )  # fmt: skip
    header = ["mode", "rows of a step", "moved in a locked step", "that at 50 GB/s", "an edit over plain", "target"]
    return markdown(header, lines)


BLOCKS = {"cost": cost, "places": places, "models": models, "misses": misses, "cpu": cpu}


def mark(name: str) -> str:
    """What stands above a table in the README."""
    return f"<!-- begin: python -m benchmarks.report --write ({name}) -->"


def filled(text: str, name: str, block: str) -> str:
    """The README with this table in its place."""
    before, rest = text.split(mark(name), 1)
    return f"{before}{mark(name)}\n{block}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        table = block()
        print(table, end="\n\n")
        text = filled(text, name, table)
    if options.write:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
