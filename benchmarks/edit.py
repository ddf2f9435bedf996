"""What the lock costs on top of a pipeline: seconds a step of the same edit, plain and locked, in one run.

`python -m benchmarks.edit` edits with the embedded miniature on one core of the CPU; `--gpu` with that and with
Wan2.1-T2V in both sizes on the first CUDA GPU, at 832x480 and 81 frames, its weights random, so that the cost is real
and the pictures are not.
"""

import argparse
import contextlib
import csv
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.profiler import profile

import kvlock
from benchmarks import _profile
from benchmarks._edit_rows import MEASURED, PIPELINE, EditRow
from benchmarks._edits import EDITS, NEEDED, Edit, named
from benchmarks._harness import Results
from benchmarks._host_memory import HostMemory
from benchmarks._machine import Machine, lacking
from benchmarks._modes import KAPPA, LOCKED_STEPS, MODES, STEPS, USUAL, Mode
from benchmarks._moving import counted
from kvlock.cli.signals import ends_when_unread

ROUNDS = {"cpu": 5, "cuda": 1}  # a CPU's clock drifts more than what is to be told apart
CLOCKS = {"cpu": time.process_time, "cuda": time.perf_counter}  # what other programs take of a core does not count


class Steps(NamedTuple):
    """What one run of the pipeline took and gave."""

    seconds: list[float]
    latents: Tensor
    peak: int  # bytes on a GPU, or 0 without one
    host: int  # bytes above those before the run, or 0 where the system does not say
    moved: int  # bytes of source rows in the last step, to their place and from it


def run(edit: Edit, device: str, seen: profile | None = None) -> Steps:
    """One edit; the host waits after each step, which the pipeline alone would not do. `seen` sees the timed steps."""
    on_gpu = device.startswith("cuda")
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    ends, moved_by = [], []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize()
        ends.append(CLOCKS[device]())
        moved_by.append(moved.bytes)
        if seen is not None and len(ends) in (1, STEPS):
            (seen.start if len(ends) == 1 else seen.stop)()
        return {}

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host = HostMemory()
    edit.pipe.set_progress_bar_config(disable=True)
    with counted() as moved:
        latents = edit.pipe(
            **edit.arguments, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
            generator=torch.Generator(device).manual_seed(0), callback_on_step_end=step_end,
        ).frames  # fmt: skip
    seconds = [end - start for start, end in itertools.pairwise(ends)]  # without the first step
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Steps(seconds, latents.float().cpu(), peak, host.peak, moved_by[-1] - moved_by[-2])


def measure(edit: Edit, device: str, modes: dict[str, Mode], machine: Machine) -> Iterator[EditRow]:
    """The plain pipeline, then every mode, each as soon as it is measured; one that fails does not end the run."""
    plain: list[Steps] = []
    before: dict[str, list[Steps]] = {name: [] for name in modes}
    failed: dict[str, str] = {}
    for _ in range(ROUNDS[device] - 1):
        plain.append(run(edit, device))
        for name in (name for name in modes if name not in failed):
            try:
                before[name].append(locked(edit, device, modes[name])[0])
            except Exception as error:
                failed[name] = _said(error)
    plain.append(run(edit, device))
    step = statistics.median(itertools.chain.from_iterable(each.seconds for each in plain))
    yield _row(edit, PIPELINE, Mode(kvlock.preset("plain")), plain, step, None, None)._replace(**machine.now())
    latents = {PIPELINE: plain[-1].latents}
    if USUAL not in modes and any(mode.same == USUAL for mode in modes.values()):
        with contextlib.suppress(Exception):  # then others are compared with nothing
            latents[USUAL] = locked(edit, device, Mode())[0].latents
    for name, mode in modes.items():
        steps = None
        if name not in failed:
            try:
                steps, trace = locked(edit, device, mode)
            except Exception as error:
                failed[name] = _said(error)
        if steps is None:
            row = _blank(edit, name)._replace(note=f"failed: {failed[name]}", **machine.now())
        else:
            latents[name] = steps.latents
            same = latents.get(mode.same)
            difference = None if same is None else (steps.latents - same).abs().max().item()
            row = _row(edit, name, mode, [*before[name], steps], step, difference, trace)._replace(**machine.now())
            if float(row.edit_ratio) > mode.target:
                row = row._replace(note=f"target {mode.target}; {_traced(edit, device, mode)}")
        yield row
        gc.collect()  # what an error has left
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def one_after_the_other(shapes: list[str], device: str, modes: dict[str, Mode], machine: Machine) -> Iterator[EditRow]:
    """A run of each shape; one that the GPU has no room for is a row that says so."""
    for shape in shapes:
        needed, unmeasured = NEEDED.get(shape, 0), EditRow(named(shape), PIPELINE, *[""] * (MEASURED - 2))
        there = torch.cuda.mem_get_info()[0] if needed else 0
        if there < needed:
            note = f"not run: it needs about {needed / 1e9:.0f} GB of device memory; {there / 1e9:.0f} are free"
            yield unmeasured._replace(note=note, **machine.now())
            continue
        try:
            yield from measure(EDITS[shape](device), device, modes, machine)
        except torch.OutOfMemoryError as error:  # of the model, or of the plain pipeline
            yield unmeasured._replace(note=f"failed: {_said(error)}", **machine.now())
        gc.collect()  # the model, before the next one is built
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _traced(edit: Edit, device: str, mode: Mode) -> str:
    try:
        return profiled(edit, device, mode)
    except Exception as error:  # the times are measured all the same
        return f"not profiled: {_said(error)}"


def locked(
    edit: Edit, device: str, mode: Mode, seen: profile | None = None
) -> tuple[Steps, list[dict[str, Any]]]:
    """One edit in this mode, and its trace."""
    config = mode.config_of(edit.pipe.transformer.config.num_layers)
    options: dict[str, Any] = {"config": config, "kernel": mode.kernel}
    source: dict[str, Any] = {"source_prompt_embeds": edit.embeds, "store": mode.store}
    with tempfile.TemporaryDirectory() as folder:
        if mode.recorded:
            path = Path(folder) / "source.kvlock"
            with kvlock.record(edit.pipe, path, edit.source, edit.masks, **options, **source):
                run(edit, device)
            source = {"recording": kvlock.Recording(path)}
        with kvlock.attach(edit.pipe, edit.source, edit.masks, **options, **source) as session:
            steps = run(edit, device, seen)
    return steps, session.trace.rows()


def profiled(edit: Edit, device: str, mode: Mode) -> str:
    """What the timed steps spend their time on."""
    seen = profile(activities=_profile.activities(device))
    steps, _ = locked(edit, device, mode, seen)
    return _profile.summary(seen, device, sum(steps.seconds))


def _blank(edit: Edit, name: str) -> EditRow:
    """What is known without a measurement."""
    return EditRow(
        edit.model, name, str(edit.pipe.transformer.dtype).removeprefix("torch."), str(edit.masks.num_tokens),
        str(len(edit.masks.index)), *[""] * (MEASURED - 5),
    )._replace(diffusers=diffusers.__version__)  # fmt: skip


def _row(
    edit: Edit,
    name: str,
    mode: Mode,
    runs: list[Steps],
    step: float,
    difference: float | None,
    trace: list[dict[str, Any]] | None,
) -> EditRow:
    """`step`: seconds of a step of the plain pipeline, which has no trace."""
    steps, of = runs[-1], lambda first, end: [s for one in runs for s in one.seconds[first:end]]
    spread = lambda *medians: f"{max(max(seconds) / min(seconds) for seconds in medians):.4f}"
    last = trace[-1] if trace else {"forwards": 2, "source_bytes": 0}
    locks = bool(trace) and mode.config.locks
    row = _blank(edit, name)._replace(
        forwards=str(last["forwards"]), source_gib=_gib(last["source_bytes"]), moved_gib=_gib(steps.moved),
        peak_gib=_gib(steps.peak) if steps.peak else "", host_gib=_gib(steps.host) if steps.host else "",
        difference="" if difference is None else f"{difference:.3g}",
    )  # fmt: skip
    if not locks:
        each = statistics.median(of(0, None))
        return row._replace(step_s=f"{each:.4f}", edit_ratio=f"{each / step:.4f}", spread=spread(of(0, None)))
    first = STEPS - LOCKED_STEPS - 1  # of the locked ones, which is no part of their median
    kinds = of(0, first), of(first + 1, None)
    each, locked_step = map(statistics.median, kinds)
    return row._replace(
        spread=spread(*kinds),
        step_s=f"{each:.4f}", locked_step_s=f"{locked_step:.4f}", locked_ratio=f"{locked_step / step:.4f}",
        first_locked_s=f"{statistics.median(of(first, first + 1)):.4f}",
        edit_ratio=f"{((1 - KAPPA) * each + KAPPA * locked_step) / step:.4f}",
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.4g}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a mode failed, 2 where a GPU is asked for and it or nvidia-ml-py is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA GPU, with Wan's shapes too")
    parser.add_argument("--shape", choices=EDITS, help="only this one of them")
    parser.add_argument("--only", metavar="NAME", default="", help="modes that have NAME in them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="add to DIR/edit-<gpu or processor>.csv")
    parser.add_argument("--commit", help="what was measured, where this is no git checkout")
    options = parser.parse_args(arguments)
    modes = {name: mode for name, mode in MODES.items() if options.only in name}
    if not modes:
        parser.error(f"no mode has {options.only!r} in its name; there are {'; '.join(MODES)}")
    if options.gpu and (lacks := lacking()):
        print(f"python -m benchmarks.edit --gpu needs {lacks}", file=sys.stderr)
        return 2
    if not options.gpu and options.shape not in (None, "miniature"):
        parser.error(f"--shape {options.shape} wants --gpu; a CPU edits with the miniature")
    device = "cuda" if options.gpu else "cpu"
    shapes = [options.shape] if options.shape else [*EDITS] if options.gpu else ["miniature"]
    said, failed = csv.writer(sys.stdout), False
    said.writerow(EditRow._fields[: MEASURED + 1])  # with the note
    with contextlib.ExitStack() as files:
        if not options.gpu:  # the clock of the CPU adds up all threads
            files.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        machine = Machine(options.commit, device)
        results: Results | None = None
        if options.out:
            results = files.enter_context(Results(options.out / f"edit-{machine.file}", EditRow._fields))
        files.enter_context(torch.no_grad())
        for row in one_after_the_other(shapes, device, modes, machine):
            if results:
                results.write(row)
            said.writerow(row[: MEASURED + 1])
            sys.stdout.flush()
            failed |= row.note.startswith("failed")
    return int(failed)


if __name__ == "__main__":
    with ends_when_unread():
        sys.exit(main())
