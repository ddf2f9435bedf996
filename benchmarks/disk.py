"""What a disk does to an edit with rows on it: how much longer locked steps take whose rows are in files of a folder.

`python -m benchmarks.disk FOLDER` writes and reads the files of `Store(place="disk")` as an edit does and needs no GPU:
a clock stands in for one, whose layers take as long as those of a shape of Wan took on an H200. The source's forward
writes the rows of a step, and the edit's two forwards read them. Once most of what is more than the system lets wait is
begun to be written early, as this package does, and once all is left to the system.
"""

import argparse
import contextlib
import csv
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import profile

from benchmarks import _edit_rows, _profile
from benchmarks._edit_model import BRANCHES, SIZES
from benchmarks._edits import named
from benchmarks._gpu_tables import NOT_YET, markdown
from benchmarks._harness import Results
from benchmarks._machine import Machine
from benchmarks._modes import KAPPA
from benchmarks.roofline import RESULTS
from kvlock import Store, transit, write_back
from kvlock.locked_layers import BEFORE_ROPE
from kvlock.places import Shelf, shelf_of
from kvlock.step_file import Piece
from kvlock.store import Rows

PACE = RESULTS / "edit-nvidia-h200.csv"
MODE = "store on disk, hooks"
EARLY, LEFT = "begun early", "left to the system"
PROBE = 2**30  # bytes, by which the disk's rate is measured


class DiskRow(NamedTuple):
    """One line of results; text."""

    shape: str
    writes: str  # EARLY or LEFT
    gib: str  # rows of a step
    plain_s: str  # of the step of a plain pipeline, on the H200
    pace_s: str  # of the three forwards of a locked one: what it takes where files take nothing
    steps: str  # behind the median: all but the first
    first_ratio: str  # the first step, which makes the files, over the pace
    locked_ratio: str  # the median of the others over the pace
    slowest_ratio: str  # the slowest of them
    edit_ratio: str  # an edit with KAPPA of its steps locked over the plain pipeline, from the median
    disk_mb_s: str  # what the disk takes of one file
    file_system: str
    may_wait_gib: str  # before the system begins to write
    note: str  # what the host does in those steps, in shares of their time
    gpu: str = ""  # the processor
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

    @classmethod
    def of(cls, shape: str) -> "Pace":
        edits = {one.row.mode: one for one in _edit_rows.latest(PACE) if one.row.model == named(shape)}
        row, plain = edits[MODE]
        return cls(SIZES[shape].layers, float(row.source_gib), float(plain.step_s))


class Event:
    """Over when the clock says so."""

    def __init__(self, due: float) -> None:
        self.due = due

    def synchronize(self) -> None:
        time.sleep(max(0, self.due - time.perf_counter()))


class Stream:
    """Of a GPU that only takes its time: a layer takes its seconds, and a copy none but what it waits for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._free = 0.0

    def computes(self, seconds: float) -> None:
        """Queue a layer; the host goes on."""
        self._free = max(self._free, time.perf_counter()) + seconds

    def record_event(self) -> Event:
        return Event(self._free)

    def wait_event(self, event: Event) -> None:
        self._free = max(self._free, event.due)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Memory:
    """Gives the memory of tensors that are no more to the next ones of their size, as torch does on a GPU."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._free[tensor.shape, tensor.dtype]
        memory = free.pop() if free else torch.empty_like(tensor)
        given = memory.detach()
        weakref.finalize(given, free.append, memory)
        return given


@contextlib.contextmanager
def clocked() -> Iterator[Stream]:
    """Inside, a clock is the CUDA device, and its memory is the host's; gives the stream that computes."""
    computing, memory = Stream(), Memory()

    def room_for(rows: Rows, before: Rows | None, device: Any, *, pinned: bool = False) -> Rows:
        return before if before is not None and transit.fits(rows, before) else rows.each(memory.empty_like)

    with (
        mock.patch.object(torch.cuda, "Stream", lambda device: Stream()),
        mock.patch.object(torch.cuda, "current_stream", lambda device: computing),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(transit, "room_for", room_for),
    ):
        yield computing


def step(shelf: Shelf, gpu: Stream, number: int, pieces: list[Piece], rows: Rows, plain: float) -> None:
    """One locked step; raises ValueError where rows do not come back."""
    a_layer = plain / BRANCHES / (len(pieces) / 2)
    shelf.turn_to(number)
    for piece in pieces:
        rows.data[0, :2] = _mark(number, piece)
        shelf.put(piece, rows, BEFORE_ROPE)
        if piece.tensor == "v":  # the attention and all else comes after them
            gpu.computes(a_layer)
    shelf.seal()
    for piece in BRANCHES * pieces:
        found = shelf.get(piece).data[0, :2]
        if not torch.equal(found, _mark(number, piece)):
            raise ValueError(f"{piece} of step {number} came back as {found.tolist()}")
        if piece.tensor == "v":
            gpu.computes(a_layer)
    gpu.synchronize()


def _mark(number: int, piece: Piece) -> torch.Tensor:
    """The first bytes of these rows, by which they are known."""
    return torch.tensor([number % 256, 2 * piece.block + (piece.tensor == "v")], dtype=torch.uint8)


def measure(folder: Path, pace: Pace, steps: int, writes: str) -> tuple[list[float], str]:
    """Seconds of each step, and what the host did in all but the first."""
    size = max(2, int(pace.gib * 2**30 / pace.layers / 2))
    rows = Rows(torch.full((1, size), 3, dtype=torch.uint8))
    layers = [(0, "blocks", block) for block in range(pace.layers)]
    pieces = [Piece(*layer, tensor) for layer in layers for tensor in "kv"]
    seen, seconds = profile(activities=_profile.activities("cpu")), []
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
                seen.start()
                last_first.callback(seen.stop)
            begun = time.perf_counter()
            step(shelf, gpu, number, pieces, rows, pace.plain)
            seconds.append(time.perf_counter() - begun)
    return seconds, _profile.host(seen, sum(seconds[1:]))


def rate(folder: Path) -> float:
    """Bytes a second that the disk takes of one file, written over, until all of it is there.

    Memory for a new file is not ready at once everywhere, and a disk is not slower for it.
    """
    block = bytes(2**22)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(2):
            begun = time.perf_counter()
            file.seek(0)
            for start in range(0, max(PROBE, 1), len(block)):
                file.write(block)
                write_back.begin(file.fileno(), start, len(block))
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begun
        return file.tell() / seconds


def file_system(folder: Path) -> str:
    """What Linux calls the kind of a folder's file system; blank elsewhere."""
    kinds = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, where, kind, *_ = line.split()
            kinds[Path(where)] = kind  # of those mounted at one place the last
    return next((kinds[parent] for parent in (folder, *folder.parents) if parent in kinds), "")


def row_of(shape: str, pace: Pace, writes: str, seconds: list[float], note: str) -> DiskRow:
    """What was measured, but for the disk."""
    first, *others = (each / pace.locked for each in seconds)
    locked = statistics.median(others)
    edit = 1 - KAPPA + KAPPA * locked * pace.locked / pace.plain
    return DiskRow(
        shape, writes, f"{pace.gib:.4g}", f"{pace.plain:.4f}", f"{pace.locked:.4f}", str(len(others)), f"{first:.4f}",
        f"{locked:.4f}", f"{max(others):.4f}", f"{edit:.4f}", "", "", "", note,
    )  # fmt: skip


def table(path: Path) -> str:
    """A line for each disk, size of a step and way to write; of what was measured twice the last."""
    if not path.exists():
        return NOT_YET
    with path.open(newline="", encoding="utf-8") as file:
        rows = [DiskRow(**line) for line in csv.DictReader(file)]
    latest = {(float(row.gib), -float(row.disk_mb_s), row.file_system, row.shape, row.writes): row for row in rows}
    times = lambda text: f"{float(text):.2f}"
    lines = [
        (f"{row.file_system}, {row.disk_mb_s} MB/s", f"{row.gib} GiB", f"{float(row.may_wait_gib):.1f} GiB", row.writes,
         times(row.first_ratio), times(row.locked_ratio), times(row.slowest_ratio), times(row.edit_ratio),
         ", ".join(share for share in row.note.split(", ") if not share.endswith(" 0%")))
        for _, row in sorted(latest.items(), key=lambda each: each[0][:-1])
    ]  # fmt: skip
    header = ["disk", "rows of a step", "may wait", "their writing is", "the first step", "the others", "the slowest"]
    made = markdown([*header, "an edit over plain", "the host"], lines)
    return f"{'; '.join(dict.fromkeys(row.gpu for row in rows))}; torch {rows[-1].torch}.\n\n{made}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go, for as long as this runs")
    parser.add_argument("--shape", choices=SIZES, default="14b", help="which sets the pace (default: %(default)s)")
    parser.add_argument("--gib", type=float, help="rows of a step, where they are not to be those of the shape")
    parser.add_argument("--steps", type=int, default=5, help="behind each median, after a first (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="add to DIR/disk-<processor>.csv")
    parser.add_argument("--commit", help="what was measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    if options.steps < 1 or (options.gib is not None and not 0 < options.gib < math.inf):
        parser.error(f"--steps {options.steps} and --gib {options.gib} want to be above 0")
    pace = Pace.of(options.shape)
    pace = pace._replace(gib=options.gib or pace.gib)
    said = csv.writer(sys.stdout)
    with contextlib.ExitStack() as last_first:
        last_first.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # each copy; files have threads of their own
        machine = Machine(options.commit, "cpu")
        try:
            free, wanted = shutil.disk_usage(options.folder).free, max(PROBE, pace.gib * 2**30)
            if free < wanted:
                parser.error(f"{options.folder} has {free / 2**30:.1f} GiB free; wanted {wanted / 2**30:.1f}")
            disk = {
                "disk_mb_s": f"{rate(options.folder) / 1e6:.0f}", "file_system": file_system(options.folder.resolve()),
                "may_wait_gib": f"{write_back.background_bytes() / 2**30:.2f}",
            }  # fmt: skip
        except OSError as error:
            parser.error(f"cannot write to {options.folder}: {error.strerror}")
        results = options.out and last_first.enter_context(
            Results(options.out / f"disk-{machine.file}", DiskRow._fields)
        )
        said.writerow(DiskRow._fields[:MEASURED])
        for writes in (LEFT, EARLY):
            os.sync()  # of what was written before this nothing waits
            row = row_of(options.shape, pace, writes, *measure(options.folder, pace, options.steps, writes))
            row = row._replace(**disk, **machine.now())
            said.writerow(row[:MEASURED])
            sys.stdout.flush()
            if results:
                results.write(row)


if __name__ == "__main__":
    main()
