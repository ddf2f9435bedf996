"""What the commands share: their input options, and the video and mask that these name."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvlock.cli.models import Model

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from torch import Tensor

    from kvlock.geometry import Geometry
    from kvlock.masks import Masks
    from kvlock.mini.scenes import Scene

EXAMPLE_FPS = 8.0
LARGEST_SEED = 2**63 - 1  # torch counts seeds in 64 bits
MOST_STEPS = 1000  # the schedulers know so many timesteps
EXAMPLE_SCENE = 15  # a green square over stripes, which the edit turns into an orange circle


class Source(NamedTuple):
    """The video to edit and where to edit it."""

    frames: Tensor  # uint8 [F, H, W, 3]
    mask: Tensor  # bool [F, H, W], True = edit
    fps: float
    scene: Scene | None = None  # of the example
    names_rate: bool = True  # whether `fps` is the video's own, as pictures have none


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name video, mask and model."""
    parser.add_argument("--video", metavar="PATH", type=path, help="video file or folder of pictures to edit")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--mask", metavar="PATH", type=path, help="mask video, folder or single picture; white = edit")
    where.add_argument("--mask-box", metavar="X0,Y0,X1,Y1", help="a still box in pixels instead of a mask")
    parser.add_argument(
        "--model", metavar="PATH_OR_HUB_ID", type=path, help="diffusers model; without it, the embedded miniature"
    )
    parser.add_argument("--trim", action="store_true", help="drop the last frames of a video whose length does not fit")
    parser.add_argument(
        "--example",
        metavar="N",
        type=_count,
        nargs="?",
        const=EXAMPLE_SCENE,
        help="use held-out scene N (default %(const)s) of the miniature's world instead of --video and --mask",
    )


def path(text: str) -> str:
    """An option that names a file or folder: "" would be the current folder, and is a variable that was not set.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path names nothing")
    return text


def _count(text: str) -> int:
    from kvlock.mini.scenes import HELD_OUT

    largest = LARGEST_SEED - HELD_OUT
    if not re.fullmatch(r"\d{1,19}", text) or int(text) > largest:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; wanted a whole number from 0 to {largest}")
    return int(text)


def add_preset_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the settings of KV-Lock."""
    parser.add_argument("--preset", default="kv-lock", help="named settings (%(default)s)")


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how the source's keys and values are kept, and where the lock acts."""
    rows = ("model", "fp8", "int8")
    parser.add_argument("--rows", choices=rows, default="model", help="dtype of the source's rows (model)")
    add_kernel_option(parser)


def add_kernel_option(parser: argparse.ArgumentParser) -> None:
    """The option that says where the lock acts."""
    kernels = ("hooks", "fused", "backend")  # named here, because the others import torch
    parser.add_argument("--kernel", choices=kernels, default="hooks", help="where the lock acts (hooks)")


def add_steps_option(parser: argparse.ArgumentParser) -> None:
    """The option that says how many steps a run has."""
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (50)")


def add_guidance_option(parser: argparse.ArgumentParser) -> None:
    """The option that says how strong a run is guided."""
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="of the pipeline (%(default)s)")


def check_run_options(args: argparse.Namespace) -> None:
    """Refuse settings of a run that no pipeline can take.

    Raises:
        ValueError: one is out of range; the message names the option.
    """
    from kvlock.config import FP32_MAX

    if args.steps is not None:
        check_range("steps", args.steps, MOST_STEPS)
    seed = getattr(args, "seed", None) or 0
    if abs(seed) > LARGEST_SEED:
        raise ValueError(f"--seed {seed} is out of range; wanted at most {LARGEST_SEED} in size")
    for option in ("guidance_scale", "background_guidance"):
        scale = getattr(args, option, None)
        if scale is not None and not 0 <= scale <= FP32_MAX:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} {scale} is out of range; wanted a finite number >= 0 and <= {FP32_MAX}")


def check_range(option: str, count: int, largest: int) -> None:
    """Refuse a count that is not in 1..largest.

    Raises:
        ValueError: it is not; the message names the option.
    """
    if not 1 <= count <= largest:
        raise ValueError(f"--{option} {count} is out of range; wanted 1 to {largest}")


def notice(message: str) -> None:
    """One line of information beside the output."""
    print(f"kvlock: {message}", file=sys.stderr)


def input_paths(args: argparse.Namespace) -> list[Path]:
    """Every file or folder the command reads, so that no output is written over it."""
    named = [args.video, args.mask, getattr(args, "source", None), *(getattr(args, "reference", None) or ())]
    return [Path(path).resolve() for path in named if path is not None]


def read_source(args: argparse.Namespace) -> Source:
    """Read video and mask, or render the example.

    Raises:
        ValueError: an option is missing or contradicts another one, or as `kvlock.video.read_video` and `read_mask`.
    """
    given = [name for name in ("video", "mask", "mask_box") if getattr(args, name) is not None]
    if args.example is not None:
        if given:
            raise ValueError(f"--example brings its own video and mask; leave out --{given[0].replace('_', '-')}")
        return _render_example(args.example)
    if args.video is None:
        raise ValueError("no video; wanted --video PATH, or --example for a built-in one")
    if len(given) == 1:
        raise ValueError("no mask; wanted --mask PATH or --mask-box X0,Y0,X1,Y1")
    from kvlock import video

    frames, fps = video.read_video(args.video)
    shape = frames.shape[:3]
    mask = video.box_mask(args.mask_box, *shape) if args.mask is None else video.read_mask(args.mask, *shape)
    return Source(frames, mask, fps, names_rate=video.has_rate(args.video))


def _render_example(number: int) -> Source:
    from kvlock.mini import scenes
    from kvlock.video import to_uint8

    scene = scenes.sample(scenes.HELD_OUT + number)
    return Source(to_uint8(scenes.render(scene)), scenes.box_mask(scene), EXAMPLE_FPS, scene)


def fit(source: Source, geometry: Geometry, *, trim: bool) -> Source:
    """Check a video's size and length against the model's, and drop trailing frames where that was asked for.

    Raises:
        ValueError: the size or the length does not fit; the message names those that do.
    """
    from kvlock.geometry import latent_frames, legal_frames

    count, height, width, _ = source.frames.shape
    check_size(height, width, geometry)
    kept = legal_frames(count, geometry.temporal_stride)
    if kept == count:
        return source
    if not trim:
        try:
            latent_frames(count, geometry.temporal_stride)
        except ValueError as error:
            raise ValueError(f"{error}; --trim drops the last {count - kept}") from error
    notice(f"--trim dropped the last {count - kept} of {count} frames")
    return source._replace(frames=source.frames[:kept], mask=source.mask[:kept])


def check_size(height: int, width: int, geometry: Geometry) -> None:
    """Refuse a picture that does not divide into whole tokens.

    Raises:
        ValueError: it does not; the message names the nearest sizes that do.
    """
    from kvlock.geometry import check_multiple

    for name, size, base in zip(("height", "width"), (height, width), geometry.pixels_per_token, strict=True):
        check_multiple(f"video {name}", size, base)


def build_masks(source: Source, model: Model, *, reference_frames: int = 0, dilate_tokens: int = 1) -> Masks:
    """The masks of the edit; refuses a mask that leaves nothing to edit or nothing to lock.

    Raises:
        ValueError: as `Masks.build`.
    """
    from kvlock.masks import Masks

    return Masks.build(
        source.mask,
        model.geometry,
        reference_frames=reference_frames,
        dilate_tokens=dilate_tokens,
        vace=model.has_vace,
    )
