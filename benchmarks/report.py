"""The tables of benchmarks/README.md that are made from results: `python -m benchmarks.report --write` renews them.

Those of a GPU are the H200's; with another file of results the same tables are printed from that.
"""

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import _disk_table, _edit_tables, _gpu_tables, _targets, accuracy
from benchmarks._gpu_tables import NOT_YET, markdown
from benchmarks._harness import Row, read
from benchmarks.offline import END
from benchmarks.packing import CPU_TARGETS
from benchmarks.roofline import RESULTS, micro_results
from kvlock.cli.signals import ends_when_unread

README = Path(__file__).with_name("README.md")
H200 = RESULTS / "nvidia-h200.csv"
H100 = RESULTS / "nvidia-h100-80gb-hbm3.csv"
CPU = RESULTS / "cpu-amd-epyc.csv"
EDITS_ON_CPU = RESULTS / "edit-amd-epyc.csv"
DISKS = RESULTS / "disk-amd-epyc.csv"
ACCURACY = RESULTS / "accuracy-miniature.csv"
ON_A_GPU: dict[str, Callable[[Path], str]] = {
    "cost": _edit_tables.cost, "targets": _targets.by_length, "operators": _targets.at_the_headline,
    "rates": _gpu_tables.rate_table, "models": _gpu_tables.models, "edits": _edit_tables.edits,
    "places": _edit_tables.places,
    "larger": functools.partial(_edit_tables.edits, shape="14b"),
    "larger places": functools.partial(_edit_tables.places, shape="14b"),
    "misses": _gpu_tables.misses, "unmeasured": _gpu_tables.unmeasured,
}  # fmt: skip
EDITS = "python -m benchmarks.edit --gpu --shape {} --out benchmarks/results"
COMMANDS = {  # what takes the rows of a table; the first has a column of them
    "operators": "python -m benchmarks --gpu --core", "targets": "python -m benchmarks --gpu",
    "rates": "python -m benchmarks --gpu --only attention",
    "models": "python -m benchmarks --gpu --only attention", "edits": EDITS.format("1.3b"),
    "places": EDITS.format("1.3b"), "larger": EDITS.format("14b"),
    "larger places": EDITS.format("14b"), "misses": "python -m benchmarks --gpu",
    "unmeasured": "python -m benchmarks --gpu", "miniature": "python -m benchmarks.edit --out benchmarks/results",
    "cpu": f"pytest benchmarks --csv benchmarks/results/{CPU.name}",
    "disks": "python -m benchmarks.disk FOLDER --gib 3 --out benchmarks/results",
    "accuracy": "python -m benchmarks.accuracy --out benchmarks/results",
}  # fmt: skip


def cpu(path: Path = CPU) -> str:
    """One core: rates only as shares of a copy and of each other in one run, from the last run of each operator."""
    found = read(path)
    rows = {(row.op, row.source, row.setting, row.provider, row.date): row for row in found}  # a run has one date
    own = {key[:3]: row for key, row in rows.items() if row.provider == "kvlock"}
    lines = []
    for (op, source, setting), row in own.items():
        others = [rows.get((op, source, setting, name, row.date)) for name in ("eager", "torch.compile")]
        target = CPU_TARGETS.get((op, source))
        share = f"{100 * float(row.share_of_copy):.0f} %" if row.library == "extension" else ""
        lines.append(
            (
                f"`{op}` {source} {setting if 'without' in setting else ''}".strip(), row.library, share,
                f"{100 * target:.0f} %" if target else "", *(_over(row, other) for other in others),
            )
        )  # fmt: skip
    versions = ", ".join(dict.fromkeys(row.torch for row in own.values()))
    table = markdown(
        ["operator", "served by", "of memcpy", "target", "eager over it", "torch.compile over it"], lines
    )
    return f"{found[-1].gpu}; torch {versions}.\n\n{table}\n\n{_attention(own.values())}"


def _attention(rows: Iterable[Row]) -> str:
    """Beside the table: attention is bound by products."""
    row = next((row for row in rows if (row.op, row.provider) == ("kv_lerp_attention_", "kvlock")), None)
    if row is None or not row.over_plain:
        return f"`kv_lerp_attention_` over torch's own attention, and its share of a product of matrices: {NOT_YET}."
    return (
        f"`kv_lerp_attention_` takes {float(row.over_plain):.2f} times as long as torch's own attention, at "
        f"{100 * float(row.share_of_matmul):.0f} % of a product of fp32 matrices."
    )


def _over(row: Row, other: Row | None) -> str:
    return "" if other is None else f"{float(other.p50) / float(row.p50):.2g}"


def packed(path: Path = ACCURACY) -> str:
    """What rows stored in 8 bits change in edits of the miniature."""
    header = ["transformer", "rows", "edits", "error of the attention, %", "background, dB", "foreground, dB"]
    return markdown(header, accuracy.table(accuracy.read(path)))


def block(name: str, table: Callable[..., str], *paths: Path) -> str:
    """A table of these files, and the command behind its rows."""
    command = f"\n\nRows by `{COMMANDS[name]}`." if name in COMMANDS else ""
    return table(*paths) + command


BLOCKS: dict[str, Callable[[], str]] = {
    **{name: functools.partial(block, name, table, H200) for name, table in ON_A_GPU.items()},
    **{name: functools.partial(block, name, ON_A_GPU[name], H200, H100) for name in ("targets", "operators")},
    "unmeasured": functools.partial(block, "unmeasured", _gpu_tables.unmeasured, *micro_results()),
    "miniature": functools.partial(block, "miniature", _edit_tables.miniature, EDITS_ON_CPU),
    "disks": functools.partial(block, "disks", _disk_table.table, DISKS),
    "cpu": functools.partial(block, "cpu", cpu, CPU),
    "accuracy": functools.partial(block, "accuracy", packed, ACCURACY),
}


def mark(name: str) -> str:
    """What stands above a table in the README."""
    return f"<!-- begin: python -m benchmarks.report --write ({name}) -->"


def filled(text: str, name: str, block: str) -> str:
    """The README with this table in its place."""
    before, rest = text.split(mark(name), 1)
    return f"{before}{mark(name)}\n{block}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, help="results of another GPU, whose tables are printed")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    options = parser.parse_args(arguments)
    if options.csv:
        if options.write:
            parser.error(f"the tables of {README.name} are those of {H200.name}")
        try:
            print(*(block(name, table, options.csv) for name, table in ON_A_GPU.items()), sep="\n\n")
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return
    text = README.read_text(encoding="utf-8")
    for name, make in BLOCKS.items():
        made = make()
        print(made, end="\n\n")
        text = filled(text, name, made)
    if options.write:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with ends_when_unread():
        main()
