"""Predictions beside measurements: `python -m benchmarks.roofline [results.csv]`; one that misses by 20 % has a mark.

Predictions need no GPU. Without a file it reads all of `results/`; `--all` adds every row that was not measured yet.
Whole edits follow the operators of their GPU.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import _edit_model, _edit_rows
from benchmarks.__main__ import CASES
from benchmarks._case import RATES, Rates
from benchmarks._edits import SHAPES, named
from benchmarks._harness import Key, Row, is_steady, key, not_failed_since, read
from benchmarks._model import Prediction, predict
from benchmarks._modes import MODES
from benchmarks.lerp import SHARE
from kvlock.cli.signals import ends_when_unread

RESULTS = Path(__file__).with_name("results")
MISS = 0.2  # of the prediction, either way
LAUNCH_US = 1.0  # a call that would need less is all launch, of which predictions know nothing
BY_KEY = {case.key: case for case in CASES}
MODELS = {named(shape): shape for shape in SHAPES}
CEILINGS = ("copy", "matmul")  # operators whose rows are what a GPU reaches
A_STEP, LOCKED_STEP = "a step", "a locked step"


class Line(NamedTuple):
    """One row of the report; `measured` is None where nobody has."""

    op: str
    provider: str
    shape: str
    source: str
    setting: str
    prediction: Prediction
    measured: float | None
    row: Row | None = None  # as it was written
    run: tuple[int, str] = (0, "")  # what it shares with the rows of its run: how many came before, and the commit

    @property
    def predictable(self) -> bool:
        """Whether there is more to predict than the start of a launch."""
        return self.prediction.us >= LAUNCH_US

    @property
    def missed(self) -> float:
        """Of the prediction, by how much; 0 where nothing is measured, or nothing to be predicted."""
        return self.measured / self.prediction.us - 1 if self.measured and self.predictable else 0.0

    @property
    def flagged(self) -> bool:
        return abs(self.missed) > MISS

    @property
    def steady(self) -> bool:
        return self.row is None or is_steady(self.row)


def micro_results() -> list[Path]:
    """The files with rows of operators on GPUs."""
    others = "edit-", "cpu", "accuracy-", "disk-"
    return sorted(path for path in RESULTS.glob("*.csv") if not path.name.startswith(others))


def rates(path: Path) -> Rates:
    """What predictions assume of the GPU of a file: where `RATES` does not know it, what its last ceilings reach.

    Raises:
        ValueError: nor has the file rows of both.
    """
    rows = read(path)
    known = next((RATES[row.gpu] for row in rows if row.gpu in RATES), None)
    reached = {row.op: 1e6 * float(row.work) / float(row.p50) for row in rows if row.op in CEILINGS and row.p50}
    lacking = [op for op in CEILINGS if op not in reached]
    if known is None and lacking:
        gpu = f"{rows[0].gpu!r}" if rows else "its GPU"
        ask = "wanted a run of python -m benchmarks --gpu"
        raise ValueError(f"{path}: no rates are known of {gpu}, and there is no row of {' and '.join(lacking)}; {ask}")
    return known or Rates(reached["copy"], reached["matmul"])


def measured(path: Path) -> list[Line]:
    """The timed rows of a file that have not failed since, with predictions. A run begins with the row of the copy."""
    found, runs, gpu = [], 0, rates(path)
    for row in not_failed_since(read(path)):
        runs += row.op == "copy"
        found.append(Line(*key(row), _prediction(row, gpu), float(row.p50), row, (runs, row.commit)))
    return found


def latest(lines: list[Line]) -> list[Line]:
    """The last steady measurement of each row, or the last where none is; in the order of the first."""
    found: dict[Key, Line] = {}
    for line in lines:
        before = found.get(line[:5])
        if before is None or line.steady or not before.steady:
            found[line[:5]] = line
    return [*found.values()]


def beside(lines: list[Line], line: Line | None, op: str, provider: str, source: str, setting: str) -> Line | None:
    """Another row at the shape of `line`, from the same run; the last one, where there are several."""
    if line is None:
        return None
    wanted = (op, provider, line.shape, source, setting)
    return next((other for other in reversed(lines) if other[:5] == wanted and other.run == line.run), None)


def _prediction(row: Row, gpu: Rates) -> Prediction:
    case = BY_KEY.get((row.op, row.shape, row.source, row.setting))
    if case is not None:
        return predict(case, row.provider, gpu)
    rate, counted = (gpu.bandwidth, "fewest bytes") if row.rate_unit == "GB/s" else (gpu.products, "FLOP")
    return Prediction(1e6 * float(row.work) / rate, counted)  # the ceilings, which are no case


def not_measured(lines: list[Line], gpu: Rates) -> Iterator[Line]:
    """The rest of what the runner has, predicted."""
    seen = {line[:5] for line in lines}
    for case in CASES:
        for provider in case.providers:
            names = case.row_key(provider)
            if names not in seen:
                yield Line(*names, predict(case, provider.name, gpu), None)


def measured_edits(path: Path, gpu: Rates) -> list[Line]:
    """The steps of the timed edits of a file, with predictions; those of the miniature have none."""
    found = []
    for edit, _ in _edit_rows.timed(path):
        if edit.model in MODELS and edit.mode in (*MODES, _edit_rows.PIPELINE):
            share = int(edit.background) / int(edit.tokens)
            for line in _steps(edit.model, edit.mode, share, gpu):
                seconds = edit.step_s if line.setting == A_STEP else edit.locked_step_s
                found.append(line._replace(measured=1e6 * float(seconds)))
    return found


def _steps(model: str, mode: str, share: float, gpu: Rates) -> Iterator[Line]:
    """A step of an edit, and a locked one where its mode locks; nobody has measured them."""
    settings = MODES["preset plain" if mode == _edit_rows.PIPELINE else mode]
    took = _edit_model.seconds(MODELS[model], settings, share, gpu)
    yield Line("edit", mode, model, "", A_STEP, Prediction(1e6 * took.plain, "FLOP and bytes"), None)
    if settings.config.locks:
        files = settings.recorded or settings.store.place == "disk"
        counted = "FLOP and bytes, without what files take" if files else "FLOP and bytes"
        yield Line("edit", mode, model, "", LOCKED_STEP, Prediction(1e6 * took.locked, counted), None)


def edits_not_measured(lines: list[Line], gpu: Rates) -> Iterator[Line]:
    """The steps of the other edits of the runner, at the background of the operators."""
    seen = {line[:5] for line in lines}
    for model in MODELS:
        for mode in (_edit_rows.PIPELINE, *MODES):
            yield from (line for line in _steps(model, mode, SHARE, gpu) if line[:5] not in seen)


def report(lines: list[Line]) -> str:
    """A line each, then how many missed."""
    text = []
    for line in lines:
        name = " ".join(filter(None, line[:5]))
        time = "not yet measured" if line.measured is None else f"{_time(line.measured)}, {1 + line.missed:.2f} times"
        mark = f"  <- misses by {100 * abs(line.missed):.0f} %" if line.flagged else ""
        text.append(f"{name}: predicted {_time(line.prediction.us)} ({line.prediction.counted}); {time}{mark}")
    timed = [line for line in lines if line.measured is not None]
    return "\n".join([*text, f"{sum(line.flagged for line in timed)} of {len(timed)} rows miss by more than 20 %"])


def _time(us: float) -> str:
    return f"{us / 1e6:.3f} s" if us >= 1e6 else f"{us:.1f} us"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="results of python -m benchmarks --gpu")
    parser.add_argument("--all", action="store_true", help="predict what was not measured too")
    options, failed = parser.parse_args(arguments), False
    for path in options.csv or micro_results():
        try:
            gpu = rates(path)
        except ValueError as error:
            print(error, file=sys.stderr)
            failed |= bool(options.csv)  # it was asked for
            continue
        edits = _edit_rows.beside(path)
        for file, lines, others in (
            (path, measured(path), not_measured), (edits, measured_edits(edits, gpu), edits_not_measured),
        ):  # fmt: skip
            lines += others(lines, gpu) if options.all else ()
            if lines:
                print(file.name, report(lines), sep="\n")
    return int(failed)


if __name__ == "__main__":
    with ends_when_unread():
        sys.exit(main())
