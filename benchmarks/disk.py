"""What a disk does to an edit with rows on it: how much longer locked steps take whose rows are in files of a folder.

`python -m benchmarks.disk FOLDER` writes and reads the files of `Store(place="disk")` as an edit does and needs no
GPU: a clock stands in for one, on which a layer takes as long as one of that shape of Wan took on an H200. The source's
forward writes the rows of a step, and the edit's two forwards read them. It runs twice: with all writing left to the
system, and with rows beyond what may wait begun to be written at once, as this package does.
"""

import argparse
import contextlib
import csv
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.profiler import profile

from benchmarks import _edit_rows, _profile
from benchmarks._clock import Stream, clocked, ends
from benchmarks._edit_model import BRANCHES, SIZES
from benchmarks._edits import named
from benchmarks._harness import Results
from benchmarks._machine import Machine
from benchmarks._modes import KAPPA, MODES
from kvlock import Store, write_back
from kvlock.cli.signals import ends_when_unread
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.places import Shelf, shelf_of
from kvlock.step_file import Piece
from kvlock.store import Rows

PACE = Path(__file__).with_name("results") / "edit-nvidia-h200.csv"
MODE = "store on disk, hooks"
TARGET = MODES[MODE].target
EARLY, LEFT = "begun early", "left to the system"
PROBE = 2**30  # bytes, by which the disk's rate is measured
SPARE = 2**20  # bytes, more than what files have beside their rows


class DiskRow(NamedTuple):
    """One line of results; text."""

    disk: str  # its name
    shape: str
    writes: str  # EARLY or LEFT
    gib: str  # rows of a step
    plain_s: str  # of the step of a plain pipeline, on the H200
    pace_s: str  # of the three forwards of a locked one: what it takes where files take nothing
    steps: str  # behind the median: all but the first; a profiler sees them
    first_ratio: str  # the first step, which makes the files, over the pace
    locked_ratio: str  # the median of the others over the pace
    slowest_ratio: str  # the slowest of them
    edit_ratio: str  # an edit with KAPPA of its steps locked over the plain pipeline, from the median
    disk_mb_s: str  # what the disk takes of one file
    disk_ratio: str  # that over what a step writes in its time
    may_wait_gib: str  # before the system begins to write
    note: str  # what the host does in these steps, in shares of their time
    gpu: str = ""  # the processor
    cores: str = ""
    system: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""


MEASURED = DiskRow._fields.index("gpu")


class Pace(NamedTuple):
    """A locked step of a shape of Wan as it is measured on a GPU."""

    layers: int
    gib: float  # rows of a step
    plain: float  # seconds of a step of the plain pipeline, of two forwards

    @property
    def locked(self) -> float:
        """Seconds of three forwards."""
        return self.plain * (BRANCHES + 1) / BRANCHES

    @property
    def rate(self) -> float:
        """Bytes a second that a locked step writes."""
        return self.gib * 2**30 / self.locked

    @classmethod
    def of(cls, shape: str) -> "Pace":
        edits = {one.row.mode: one for one in _edit_rows.latest(PACE) if one.row.model == named(shape)}
        row, plain = edits[MODE]
        return cls(SIZES[shape].layers, float(row.source_gib), float(plain.step_s))


def step(shelf: Shelf, gpu: Stream, number: int, pieces: list[Piece], rows: Rows, plain: float) -> None:
    """One locked step; raises ValueError where rows do not come back."""
    a_layer = plain / BRANCHES / (len(pieces) / 2)
    shelf.turn_to(number)
    for piece in pieces:
        ends(rows.data)[:] = _mark(number, piece)
        shelf.put(piece, rows, BEFORE_ROPE)
        if piece.tensor == "v":  # the attention and all else comes after them
            gpu.computes(a_layer)
    shelf.seal()
    for piece in BRANCHES * pieces:
        found, wanted = ends(shelf.get(piece).data), _mark(number, piece)
        if not (found == wanted).all():
            raise ValueError(
                f"{piece} of step {number} came back with {found.tolist()}; wanted {2 * [wanted.tolist()]}"
            )
        if piece.tensor == "v":
            gpu.computes(a_layer)
    gpu.synchronize()


def _mark(number: int, piece: Piece) -> torch.Tensor:
    """By which these rows are known, at both their ends."""
    return torch.tensor([1 + number % 255, 1 + 2 * piece.block + (piece.tensor == "v")], dtype=torch.uint8)


def measure(folder: Path, pace: Pace, steps: int, writes: str) -> tuple[list[float], str]:
    """Seconds of each step, a first one and so many more, and what the host did in all but the first."""
    size = max(8, int(pace.gib * 2**30 / pace.layers / 2))
    rows = Rows(torch.randint(0, 256, (1, size), dtype=torch.uint8))  # which no disk can make smaller
    layers = [(0, "blocks", block) for block in range(pace.layers)]
    pieces = [Piece(*layer, tensor) for layer in layers for tensor in "kv"]
    seconds = []
    with contextlib.ExitStack() as last_first:
        last_first.enter_context(torch.no_grad())
        gpu = last_first.enter_context(clocked())
        if writes == LEFT:
            last_first.enter_context(mock.patch.object(write_back, "background_bytes", lambda: math.inf))
        shelf = shelf_of(Store(place="disk", folder=folder))
        assert shelf is not None
        last_first.callback(shelf.close)
        shelf.serve(torch.device("cuda"), layers)
        for number in range(steps + 1):
            if number == 1:
                seen = last_first.enter_context(profile(activities=_profile.activities("cpu")))
            begun = time.perf_counter()
            step(shelf, gpu, number, pieces, rows, pace.plain)
            seconds.append(time.perf_counter() - begun)
    return seconds, _profile.host(seen, sum(seconds[1:]))


def rate(folder: Path) -> float:
    """Bytes a second that the disk takes of one file, written over, until all of it is there.

    Memory for a new file is not ready at once everywhere, and a disk is not slower for it.
    """
    block = os.urandom(2**22)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(2):
            begun = time.perf_counter()
            file.seek(0)
            for start in range(0, PROBE, len(block)):
                file.write(block)
                write_back.begin(file.fileno(), start, len(block))
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begun
        return file.tell() / seconds


def row_of(pace: Pace, seconds: list[float]) -> DiskRow:
    """What the times of steps say."""
    first, *others = (each / pace.locked for each in seconds)
    locked = statistics.median(others)
    edit = 1 - KAPPA + KAPPA * locked * pace.locked / pace.plain
    return DiskRow(*[""] * len(DiskRow._fields))._replace(
        gib=f"{pace.gib:.4g}", plain_s=f"{pace.plain:.4f}", pace_s=f"{pace.locked:.4f}", steps=str(len(others)),
        first_ratio=f"{first:.4f}", locked_ratio=f"{locked:.4f}", slowest_ratio=f"{max(others):.4f}",
        edit_ratio=f"{edit:.4f}",
    )  # fmt: skip


def above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    """For an option that wants a number above 0, of an int or a float."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            found = kind(text)
            if 0 < found < math.inf:
                return found
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted {what} above 0")

    return number


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go, for as long as this runs")
    parser.add_argument("--disk", metavar="NAME", help="what rows call the disk (default: the folder)")
    parser.add_argument("--shape", choices=SIZES, default="14b", help="which sets the pace (default: %(default)s)")
    parser.add_argument("--gib", type=above_zero(float), help="rows of a step, where not those of the shape")
    parser.add_argument(
        "--steps", type=above_zero(int), default=5, help="behind each median, after a first (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="add to DIR/disk-<processor>.csv")
    parser.add_argument("--commit", help="what was measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    pace = Pace.of(options.shape)
    pace = pace._replace(gib=options.gib or pace.gib)
    try:
        _measured(options, pace)
    except OSError as error:
        parser.error(f"{error.filename or options.out or options.folder}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))


def _measured(options: argparse.Namespace, pace: Pace) -> None:
    """Print a row of each way to write, and add it to a file where one is wanted."""
    said, wanted = csv.writer(sys.stdout), max(PROBE, pace.gib * 2**30) + SPARE
    with contextlib.ExitStack() as last_first:
        last_first.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # each copy; files have threads of their own
        machine = Machine(options.commit, "cpu")
        results = options.out and last_first.enter_context(
            Results(options.out / f"disk-{machine.file}", DiskRow._fields)
        )
        found = _rate(options.folder, wanted)
        about = {
            "disk": options.disk or str(options.folder), "shape": options.shape, "disk_mb_s": f"{found / 1e6:.1f}",
            "disk_ratio": f"{found / pace.rate:.3f}", "cores": str(os.cpu_count()),
            "may_wait_gib": f"{write_back.background_bytes() / 2**30:.2f}",
            "system": f"{platform.system()} {platform.release()}",
        }  # fmt: skip
        said.writerow(DiskRow._fields[:MEASURED])
        for writes in (LEFT, EARLY):
            if hasattr(os, "sync"):
                os.sync()  # of what was written before this nothing waits
            seconds, note = measure(options.folder, pace, options.steps, writes)
            row = row_of(pace, seconds)._replace(writes=writes, note=note, **about, **machine.now())
            said.writerow(row[:MEASURED])
            sys.stdout.flush()
            if results:
                results.write(row)


def _rate(folder: Path, wanted: float) -> float:
    """As `rate`, of a folder with so many bytes free.

    Raises:
        ValueError: it has fewer, or nothing can be written there.
    """
    try:
        free = shutil.disk_usage(folder).free
        if free < wanted:
            raise ValueError(f"{folder} has {free / 2**30:.2f} GiB free; wanted {wanted / 2**30:.2f}")
        return rate(folder)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


if __name__ == "__main__":
    with ends_when_unread():
        main()
