"""Edits from a recording: it fills in the options that the command line leaves open."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from kvlock.cli import inputs, models, runs

if TYPE_CHECKING:
    from kvlock.config import KVLockConfig

# Options that say what a recording says, and those of which one may be given that agrees with it.
DECIDED = ("video", "mask", "mask_box", "example", "reference", "source_prompt", "trim", "rows", "place")
FILLED_IN = ("model", "steps", "seed", "kernel", "dtype")
# What kvlock record writes about an edit.
KINDS: dict[str, tuple[type, ...]] = {"model": (str, type(None)), "dtype": (str,), "seed": (int, type(None)),
                                      "kernel": (str,), "fps": (int, float), "source_prompt": (str,)}  # fmt: skip


def leave_open(parser: argparse.ArgumentParser) -> None:
    """Tell options that are given from their defaults, which `fill_in` puts in place."""
    options = {name: parser.get_default(name) for name in (*DECIDED, *FILLED_IN)}
    parser.set_defaults(**dict.fromkeys(options), defaults=options)


def fill_in(args: argparse.Namespace) -> None:
    """Put the defaults in place of what is still open."""
    for name, default in args.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def task(args: argparse.Namespace, config: KVLockConfig) -> runs.Task:
    """The task of an edit with the recording that `args` names.

    Raises:
        ValueError: the recording is not whole, has no video, or was made with another setting than `args` has; or an
            option says what the recording does.
    """
    import torch

    from kvlock.recording import Recording

    for option in DECIDED:
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"--source has its own video, conditions and rows; leave out --{name}")
    if args.prompt is None:
        raise ValueError("no prompt; wanted --prompt TEXT")
    recording = Recording(args.source)
    about, found = recording.about, recording.inputs
    if not set(KINDS) <= set(about) or not {"frames", "mask"} <= set(found):
        raise ValueError(f"{args.source} was not made by kvlock record, and does not hold all that an edit needs")
    wrong = [name for name, kinds in KINDS.items() if not isinstance(about[name], kinds)]
    if not wrong and not 0 < about["fps"] < math.inf:
        wrong = ["fps"]
    if not wrong and about["dtype"] not in models.DTYPES:
        wrong = ["dtype"]
    if wrong:
        raise ValueError(f"{args.source} says {wrong[0]}={about[wrong[0]]!r}, which kvlock record does not write")
    if found["frames"].dtype is not torch.uint8:
        raise ValueError(f"{args.source} has frames of {found['frames'].dtype}; wanted torch.uint8, as videos have")
    if args.steps is not None and config.locks:
        recording.agree(steps=args.steps)
    recorded = about | {"steps": recording.fields["steps"]}
    for name in FILLED_IN:
        if getattr(args, name) is None:
            setattr(args, name, recorded[name])
    fill_in(args)
    source = inputs.Source(found["frames"], found["mask"].bool(), about["fps"])
    prompts = {"prompt": args.prompt, "source_prompt": about["source_prompt"], "negative_prompt": args.negative_prompt}
    count = sum(name.startswith("reference_") for name in found)
    references = [_picture(found[f"reference_{i}"]) for i in range(count)]
    return runs.checked(args, config, source, prompts, references)._replace(recording=recording)


def _picture(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.numpy())
