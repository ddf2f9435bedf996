"""kvlock record: keep the source's keys and values of all locked steps, for any number of edits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlock.cli import inputs, runs

if TYPE_CHECKING:
    from kvlock.config import KVLockConfig

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
    source = inputs.read_source(args)
    prompts: dict[str, str | None] = {"source_prompt": runs.source_prompt(args, source)}
    task = runs.checked(args, config, source, prompts, runs.read_references(args))
    pipe = runs.load(args, task)
    recorder = KVLockPipeline(pipe, config, kernel=args.kernel or "hooks", store=Store(args.rows))
    about = {"model": args.model, "fps": task.source.fps, "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    with runs.progress("record", args.steps) as show:
        recording = recorder.record(
            args.out, task.source.frames, task.source.mask, generator=runs.generator(args.seed), progress=show,
            about=about, **task.settings,
        )  # fmt: skip
    unit, name = byte_unit(recording.bytes_on_disk)
    print(f"wrote       {args.out}: {recording.bytes_on_disk / unit:.1f} {name}")
    print(f"steps       {len(recording.steps)} of {args.steps}, the last ones (preset {args.preset})")
    print(f"next        kvlock edit --source {args.out} --prompt TEXT")


def replayed(args: argparse.Namespace, config: KVLockConfig) -> runs.Task:
    """The task of an edit with the recording that `args` names, whose settings fill in what `args` leaves open.

    Raises:
        ValueError: the recording is not whole, has no video, or was made with another setting than `args` has; or an
            option says what the recording does.
    """
    from kvlock.recording import Recording

    for option in ("video", "mask", "mask_box", "example", "reference", "source_prompt"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--source brings its own video, mask and conditions; leave out --{name}")
    for option, default in (("trim", False), ("rows", "model"), ("place", "device")):
        if getattr(args, option) != default:
            raise ValueError(f"--source has its rows and video as they were recorded; leave out --{option}")
    if args.prompt is None:
        raise ValueError("no prompt; wanted --prompt TEXT")
    recording = Recording(args.source)
    about, found = recording.about, recording.inputs
    if not {"frames", "mask"} <= set(found) or "fps" not in about:
        raise ValueError(f"{args.source} holds no video; wanted a recording made by kvlock record")
    args.steps = recording.fields["steps"] if args.steps is None else args.steps
    recording.note(steps=args.steps)
    args.seed = about["seed"] if args.seed is None else args.seed
    args.model = about["model"] if args.model is None else args.model
    args.kernel = about["kernel"] if args.kernel is None else args.kernel
    args.dtype = about["dtype"] if args.dtype == "auto" else args.dtype
    source = inputs.Source(found["frames"], found["mask"].bool(), about["fps"])
    prompts = {"prompt": args.prompt, "source_prompt": about["source_prompt"], "negative_prompt": args.negative_prompt}
    count = sum(name.startswith("reference_") for name in found)
    references = [_picture(found[f"reference_{i}"]) for i in range(count)]
    return runs.checked(args, config, source, prompts, references)._replace(recording=recording)


def _picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.numpy())
