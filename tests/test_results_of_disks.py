"""What the documents say of a disk under an edit is what the committed rows say."""

import csv

from benchmark_readme import table, text

from benchmarks import disk, report
from benchmarks.disk import TARGET, DiskRow

with report.DISKS.open(newline="", encoding="utf-8") as _file:
    ROWS = [DiskRow(**line) for line in csv.DictReader(_file)]
PAIRS = {left.disk: (left, early) for left, early in zip(ROWS[::2], ROWS[1::2], strict=True)}
UNLIMITED, TWICE, EQUAL, SLOWER, SLOWEST = PAIRS.values()


def test_every_row_has_its_line_its_profile_and_its_commit() -> None:
    lines = table("disk")
    assert len(lines) == len(ROWS) == 10
    for line, row in zip(lines, ROWS, strict=True):
        assert line[:2] == [row.disk, f"{row.gib} GiB"] and line[3] == row.writes
        numbers = row.first_ratio, row.locked_ratio, row.slowest_ratio
        assert line[4:7] == [f"{float(number):.2f}" for number in numbers]
        met = "met" if float(row.edit_ratio) <= TARGET else "missed"
        assert line[7:9] == [f"{float(row.edit_ratio):.3f}", f"{TARGET}, {met}"]
        assert row.note.startswith(line[9]) and "wait_for_write" in row.note
        assert "changes" not in row.commit and row.shape == "14b" and row.steps == "5" and row.cores == "2"
    assert len({(row.commit, row.gpu, row.torch, row.system) for row in ROWS}) == 1
    for left, early in PAIRS.values():
        assert (left.writes, early.writes) == (disk.LEFT, disk.EARLY) and left.disk == early.disk


def test_the_early_beginning_makes_of_misses_what_the_text_says() -> None:
    assert all(float(row.locked_ratio) < 1.01 for row in (*UNLIMITED, *TWICE)) and float(TWICE[0].disk_ratio) > 2
    assert 1 < float(EQUAL[0].disk_ratio) < 1.1
    edits = [[float(row.edit_ratio) for row in pair] for pair in (EQUAL, SLOWER)]
    before, after = zip(*edits, strict=True)
    assert min(before) > TARGET >= max(after)
    text(f"One that is as fast, or has {float(SLOWER[0].disk_ratio):.2f} of that rate, makes an edit miss its target "
         f"({before[0]:.2f} and {before[1]:.2f} times the plain pipeline's time), and with the early beginning meet it "
         f"({after[0]:.2f} and, narrowly, {after[1]:.2f}). One of {float(SLOWEST[0].disk_ratio):.2f} is too slow "
         "for both.")  # fmt: skip
    assert all(float(row.edit_ratio) > TARGET for row in SLOWEST)
    limits = {row: float(row.disk.split()[-2]) for pair in (TWICE, EQUAL, SLOWER, SLOWEST) for row in pair}
    above = max(float(row.disk_mb_s) / limit - 1 for row, limit in limits.items())
    text(f"of which the block layer lets up to {100 * above:.0f} % more through than its limit.")
    first = {f"{float(row.first_ratio):.1f}" for row in (*UNLIMITED, *TWICE)}
    text(f"it takes {min(first)} to {max(first)} times its forwards even where the disk holds nobody up.")


def test_what_a_step_writes_is_what_the_text_says() -> None:
    full = disk.Pace.of("14b")
    here, there = (f"{pace.rate / 1e6:.0f} MB/s" for pace in (full._replace(gib=3), full))
    text(f"what a step writes in its time: {here} here, {there} for 19.5 GiB.")
    text(f"It is not that of a real step, which copies {full.gib / 3:.1f} times as much.")
    assert {row.may_wait_gib[:3] for row in ROWS} <= {"1.7", "1.8"}
    text("this machine has 18 GiB of memory for files, of which 1.8 may wait.")
