"""What the documents say of a disk under an edit is what the committed rows say."""

import csv

from benchmark_readme import table, text

from benchmarks import _edit_tables, disk, report
from benchmarks._modes import MODES

with report.DISKS.open(newline="", encoding="utf-8") as _file:
    ROWS = [disk.DiskRow(**line) for line in csv.DictReader(_file)]
TARGET = MODES[disk.MODE].target


def ratios(mb_s: int, gib: str = "3") -> tuple[disk.DiskRow, disk.DiskRow]:
    """Left to the system, and begun early."""
    left, early = (row for row in ROWS if (row.disk_mb_s, row.gib) == (str(mb_s), gib))
    assert (left.writes, early.writes) == (disk.LEFT, disk.EARLY)
    return left, early


def test_every_row_has_its_line_its_profile_and_its_commit() -> None:
    lines = table("disk")
    order = sorted(ROWS, key=lambda row: (float(row.gib), -float(row.disk_mb_s)))  # and the two of a run as they came
    assert len(lines) == len(ROWS) == 12
    for line, row in zip(lines, order, strict=True):
        assert line[:2] == [f"ext4, {row.disk_mb_s} MB/s", f"{row.gib} GiB"] and line[3] == row.writes
        numbers = row.first_ratio, row.locked_ratio, row.slowest_ratio, row.edit_ratio
        assert line[4:8] == [f"{float(number):.2f}" for number in numbers]
        assert "wait_for_write" in row.note and line[8] in row.note.replace(", wait_for_copy 0%", "")
        assert "changes" not in row.commit and row.shape == "14b" and row.steps == "5"
    assert len({(row.commit, row.gpu, row.torch) for row in ROWS}) == 1
    assert [row.gib for row in order[-2:]] == ["4", "4"] and {row.gib for row in order[:-2]} == {"3"}


def test_the_early_beginning_makes_of_a_miss_what_the_text_says() -> None:
    left, early = ratios(369)
    text(f"Left to the system, an edit on a disk of 369 MB/s takes {float(left.edit_ratio):.2f} times the plain "
         f"pipeline's time, its slowest step {float(left.slowest_ratio):.2f} times its forwards', much as the row of "
         f"the H200 does; begun early it takes {float(early.edit_ratio):.2f} times.")  # fmt: skip
    measured = _edit_tables.edits_of(report.H200, "14b")[disk.MODE].row
    assert float(left.edit_ratio) > TARGET >= float(early.edit_ratio)
    assert abs(float(measured.edit_ratio) - float(left.edit_ratio)) < 0.02
    slower, slow = ratios(250)
    text(f"With 250 MB/s that is {float(slower.edit_ratio):.2f} and {float(slow.edit_ratio):.2f}.")
    assert all(float(row.edit_ratio) < TARGET for row in ratios(557))
    assert all(float(row.edit_ratio) > TARGET + 0.2 for row in ratios(125))


def test_the_size_of_steps_is_as_large_a_part_of_the_memory_as_on_a_larger_machine() -> None:
    of = disk.Pace.of("14b").gib / 3 * 18
    text(f"a machine with 18 GiB left for files, and the block layer lets so much a second through. Steps of 3 GiB are "
         f"as much of that as 19.5 GiB are of {of:.0f}; the last two rows are by `--gib 4`.")  # fmt: skip
    assert {f"{10 * float(row.may_wait_gib):.0f}" for row in ROWS} == {"18"}
    assert min(float(row.first_ratio) for row in ratios(3767)) > 1.3  # whatever the disk
