"""The table of what a disk does to an edit with rows on it."""

import csv
from pathlib import Path

from benchmarks._gpu_tables import NOT_YET, markdown
from benchmarks.disk import TARGET, DiskRow


def table(path: Path) -> str:
    """A line for each disk, size of a step and way to write; of what was measured twice the last."""
    if not path.exists():
        return NOT_YET
    with path.open(newline="", encoding="utf-8") as file:
        rows = [DiskRow(**line) for line in csv.DictReader(file)]
    latest = [*{(row.gpu, row.disk, row.shape, row.gib, row.writes): row for row in rows}.values()]
    times = lambda text: f"{float(text):.2f}"
    lines = [
        (row.disk, f"{row.gib} GiB", times(row.disk_ratio), row.writes, times(row.first_ratio),
         times(row.locked_ratio), times(row.slowest_ratio), f"{float(row.edit_ratio):.3f}",
         f"{TARGET:.2f}, {'met' if float(row.edit_ratio) <= TARGET else 'missed'}",
         ", ".join(share for share in row.note.split(", ") if not share.endswith(" 0%")))
        for row in latest
    ]  # fmt: skip
    header = ["disk", "rows of a step", "its rate over a step's", "writing", "the first step", "the others"]
    made = markdown([*header, "the slowest", "an edit over plain", "target", "the host's time"], lines)
    of = dict.fromkeys(f"{row.gpu}, {row.cores} cores; {row.system}; torch {row.torch}" for row in latest)
    return f"{'; '.join(of)}.\n\n{made}"
