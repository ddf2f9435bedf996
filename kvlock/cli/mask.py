"""kvlock mask: write an overlay video of the tokens that an edit would lock."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvlock.cli import inputs, models, outputs

DEFAULT_OUT = "kvlock-out/locked.mp4"


def add_options(parser: argparse.ArgumentParser) -> None:
    inputs.add_options(parser)
    parser.add_argument("--out", metavar="PATH", type=Path, default=Path(DEFAULT_OUT), help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Write the overlay and say how much of the video is locked.

    Raises:
        ValueError: bad input.
    """
    outputs.check(args.out, (), inputs.input_paths(args))
    model = models.describe(args.model)
    source = inputs.fit(inputs.read_source(args), model.geometry, trim=args.trim)
    masks = inputs.build_masks(source, model)
    from kvlock import video

    with outputs.staged(args.out.parent) as folder:
        video.write_video(folder / args.out.name, video.overlay(source.frames, masks.pixels()), source.fps)
    print(f"wrote    {args.out}: locked tokens are tinted blue")
    print(f"locked   {masks.background_rows} of {masks.num_tokens} tokens ({masks.background_share:.0%})")
