"""The benchmark runner: `python -m benchmarks --gpu` measures, without --gpu it lists the cases."""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

from benchmarks import attention, guidance, lerp, norm_rope, packing, variance
from benchmarks._case import RATES, TARGET_GPU, Case
from benchmarks._harness import (
    Ceilings,
    Machine,
    Results,
    copy_row,
    is_steady,
    key,
    matmul_row,
    not_failed_since,
    read,
    rows,
)
from benchmarks._machine import lacking
from benchmarks._model import predict
from benchmarks.plain_attention import FORCED
from kvlock.cli.signals import ends_when_unread

CASES = (*lerp.CASES, *packing.CASES, *norm_rope.CASES, *variance.CASES, *guidance.CASES, *attention.CASES)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a row failed its check or could not be measured, 2 without GPU or nvidia-ml-py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on the first CUDA GPU")
    parser.add_argument("--core", action="store_true", help="the core, about 40 rows, marked in the list")
    only = "cases whose line in the list has NAME in it; plain attention joins what is set against it"
    parser.add_argument("--only", metavar="NAME", default="", help=only)
    parser.add_argument("--by", metavar="NAME", default="", help="providers whose name has NAME in it")
    parser.add_argument("--new", action="store_true", help="only rows that this GPU's file has no steady, whole one of")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--commit", help="what was measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in case.label and (case.core or not options.core)]
    if options.core:
        cases = [case.short() for case in cases]
    if not cases:
        parser.error(f"no case has {options.only!r} in its line")
    if options.by:
        cases = [case.by(options.by) for case in cases]
        if not any(case.providers for case in cases):
            parser.error(f"no provider of these cases has {options.by!r} in its name")
    if not options.gpu:
        print(*map(describe, with_plain(cases)), sep="\n")
        return 0
    if lacks := lacking():
        print(f"python -m benchmarks --gpu needs {lacks}", file=sys.stderr)
        return 2
    cases = with_plain([*map(attention.here, cases)])
    return int(not measure(cases, options.out, options.commit, new=options.new, minutes=options.minutes))


def describe(case: Case) -> str:
    """One line: the case, its bytes or FLOP, the prediction for the GPU of the targets and who computes it.

    A star marks who belongs to the core.
    """
    work = case.work(case.shape)
    providers = ", ".join(provider.name + "*" * (provider.name in case.core) for provider in case.providers)
    amount = f"{work.amount / 1e6:.1f} MB" if work.unit == "GB/s" else f"{work.amount / 1e12:.3g} TFLOP"
    predicted = predict(case, "kvlock", RATES[TARGET_GPU]).us
    return f"{case.label}: {amount}, predicted {predicted:.1f} us; {providers}"


def with_plain(cases: list[Case]) -> list[Case]:
    """The cases, in the order of the runner, and plain attention beside what is compared with it."""
    asked = {case.key: {provider.name: provider for provider in case.providers} for case in cases}
    beside = {(case.shape.name, name) for case in cases for p in case.providers if p.over for name in (p.over, FORCED)}
    found = []
    for case in CASES:
        plain = {name for shape, name in beside if case.op == "attention" and case.shape.name == shape}
        given = asked.get(case.key, {})
        providers = tuple(given.get(p.name, p) for p in case.providers if p.name in {*given, *plain})
        if providers:
            found.append(dataclasses.replace(case, providers=providers))
    return found


def missing(cases: list[Case], path: Path) -> list[Case]:
    """The cases with those of their providers that a file of results has no steady row of, or none that is whole.

    A whole row has its relative error, and its time over plain attention where that can be measured. One that failed
    since counts no more.
    """
    found = [row for row in not_failed_since(read(path) if path.exists() else []) if is_steady(row)]
    plain = {(row.shape, row.provider) for row in found if row.op == "attention"}
    over = {case.row_key(p) for case in cases for p in case.providers if (case.shape.name, p.over) in plain}
    seen = {key(row) for row in found if row.relative_error and (row.over_plain or key(row) not in over)}
    return [
        dataclasses.replace(case, providers=tuple(p for p in case.providers if case.row_key(p) not in seen))
        for case in cases
    ]


def measure(
    cases: list[Case], out: Path, commit: str | None, *, new: bool = False, minutes: float = math.inf
) -> bool:
    """Measures, writes and draws the cases; what a cut run has measured stays. Returns whether every row is a time."""
    machine, end = Machine(commit), time.monotonic() + 60 * minutes
    path = out / machine.file
    cases = with_plain(missing(cases, path)) if new else cases
    bad = 0
    with Results(path) as results:
        row, copy = copy_row(machine)
        results.write(row)
        print(f"device copy: {row.rate} GB/s")
        row, matmul = matmul_row(machine)
        results.write(row)
        print(f"matmul: {row.rate} TFLOP/s")
        for row in rows(cases, machine, Ceilings(copy, matmul)):
            results.write(row)
            bad += row.status != "ok"
            share = f"{row.share_of_copy or row.share_of_matmul or '-'} of {'copy' if row.share_of_copy else 'matmul'}"
            took = f"{row.p50} us, {share}" if row.status == "ok" else row.note
            print(f"{row.op} {row.source} {row.shape} {row.setting} {row.provider}: {row.status}, {took}", flush=True)
            if time.monotonic() > end:
                print(f"stopped after {minutes:g} minutes; --new goes on")
                break
    from benchmarks import figures  # needs matplotlib, which nothing else here does

    figures.draw(path)
    if bad:
        print(f"{bad} rows have no time: they failed their check, or could not be measured", file=sys.stderr)
    return not bad


if __name__ == "__main__":
    with ends_when_unread():
        sys.exit(main())
