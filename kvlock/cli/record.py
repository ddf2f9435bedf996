"""kvlock record: keep the source's keys and values of all locked steps, for any number of edits."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvlock.cli import inputs, runs

DEFAULT_OUT = "source.kvlock"


def add_options(parser: argparse.ArgumentParser) -> None:
    runs.add_options(parser, edits=False)
    inputs.add_preset_option(parser)
    inputs.add_store_options(parser)
    parser.add_argument("--out", metavar="PATH", type=Path, default=Path(DEFAULT_OUT), help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Run the source, and write a recording or nothing.

    Raises:
        ValueError: bad input, or the recording cannot be written.
    """
    from kvlock.config import preset
    from kvlock.cost import byte_unit
    from kvlock.pipeline import KVLockPipeline
    from kvlock.recorder import check_path
    from kvlock.store import Store

    config = preset(args.preset)
    inputs.check_run_options(args)
    check_path(args.out)
    if args.out.resolve().parent in inputs.input_paths(args):
        raise ValueError(f"{args.out.parent} is an input folder, which must not change; choose another with --out")
    source = inputs.read_source(args)
    prompts: dict[str, str | None] = {"source_prompt": runs.source_prompt(args, source)}
    task = runs.checked(args, config, source, prompts, runs.read_references(args))
    pipe = runs.load(args, task)
    recorder = KVLockPipeline(pipe, config, kernel=args.kernel, store=Store(args.rows))
    model = str(Path(args.model).absolute()) if args.model is not None and Path(args.model).is_dir() else args.model
    about = {"model": model, "fps": task.source.fps, "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    with runs.progress("record", args.steps) as show:
        recording = recorder.record(
            args.out, task.source.frames, task.source.mask, generator=runs.generator(args.seed), progress=show,
            about=about, **task.settings,
        )  # fmt: skip
    unit, name = byte_unit(recording.bytes_on_disk)
    print(f"wrote       {args.out}: {recording.bytes_on_disk / unit:.1f} {name}")
    print(f"steps       {len(recording.steps)} of {args.steps}, the last ones (preset {args.preset})")
    print(f"next        kvlock edit --source {args.out} --prompt TEXT")
