"""Rows of whole edits: their columns, and which of them a report goes by."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIPELINE = "pipeline"  # the mode without this package


class EditRow(NamedTuple):
    """One line of results; text, because what was not measured stays blank."""

    model: str
    mode: str
    dtype: str
    tokens: str
    background: str  # tokens
    step_s: str  # median of the steps without a lock
    locked_step_s: str  # median of those with one but for the first; blank where there is none
    first_locked_s: str  # that first one, which makes memory and files and may compile kernels; median of the rounds
    locked_ratio: str  # to a step of the plain pipeline
    edit_ratio: str  # of an edit with KAPPA of its steps locked, from the two medians
    forwards: str  # of the last step
    source_gib: str  # keys and values that it keeps
    moved_gib: str  # of them to and from the host or the disk, counted in the last step
    peak_gib: str  # device memory of the run
    host_gib: str  # memory of the process above that before the run, at its highest in it
    spread: str  # the slowest over the fastest of the steps that a median is of; of two medians the larger
    difference: str  # largest, of the final latents, to those of the hooks, or of preset plain to the plain pipeline
    note: str = ""  # where a target was missed what a step spends its time on, or why a mode failed
    gpu: str = ""
    driver: str = ""
    sm_mhz: str = ""
    memory_mhz: str = ""
    power_w: str = ""
    torch: str = ""
    triton: str = ""
    diffusers: str = ""
    commit: str = ""
    date: str = ""


MEASURED = EditRow._fields.index("note")  # columns that say what was measured, and not on what


class Edited(NamedTuple):
    """A row with that of the plain pipeline in the same run."""

    row: EditRow
    plain: EditRow


def latest(path: Path) -> list[Edited]:
    """The last measurement of each model and mode, in the order of the first; none where there is no such file."""
    return [*{(one.row.model, one.row.mode): one for one in timed(path)}.values()]


def timed(path: Path) -> Iterator[Edited]:
    """What was timed; a run begins with the plain pipeline."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = [EditRow(**line) for line in csv.DictReader(file)]
    plain: EditRow | None = None
    for row in rows:
        if row.mode == PIPELINE:
            plain = row if row.step_s else None
        if plain is not None and row.step_s and row.model == plain.model:
            yield Edited(row, plain)


def beside(path: Path) -> Path:
    """The file of the edits measured on the GPU of a file of operators."""
    return path.with_name(f"edit-{path.name}")
