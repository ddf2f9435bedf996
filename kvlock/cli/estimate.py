"""kvlock estimate: print the forward passes of an edit and the memory its lock adds, without loading weights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from kvlock.cli import inputs, models

if TYPE_CHECKING:
    from kvlock.cost import Cost

MASK_SHARE = 0.25
LARGEST_SIDE = 10**6  # of a stated video, in frames or pixels


class Video(NamedTuple):
    """The sizes of the video to edit."""

    frames: int
    height: int
    width: int


def add_options(parser: argparse.ArgumentParser) -> None:
    inputs.add_options(parser)
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="of the video, in place of --video")
    parser.add_argument("--mask-share", type=float, help=f"share of masked tokens without a video ({MASK_SHARE})")
    inputs.add_preset_option(parser)
    inputs.add_steps_option(parser)
    inputs.add_guidance_option(parser)
    inputs.add_kernel_option(parser)
    dtypes = ("auto", *models.DTYPES)
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the transformer (%(default)s)")
    parser.add_argument("--device", default="auto", help="torch device the edit will run on (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the estimate.

    Raises:
        ValueError: bad input.
    """
    from kvlock.config import MIN_HISTORY, preset
    from kvlock.cost import estimate
    from kvlock.store import PLACES, Store

    config = preset(args.preset)
    inputs.check_run_options(args)
    model = models.describe(args.model)
    start = model.first_step(args.steps)
    video, tokens, rows = _sizes(args, model, config.dilate_tokens)
    dtype = models.resolve_dtype(args.dtype, args.model, models.resolve_device(args.device).type)

    def cost_of(store: Store | None, source: str = "store") -> Cost:
        return estimate(
            model.sizes,
            preset(args.preset, source=source),
            tokens=tokens,
            background_rows=rows,
            num_steps=args.steps,
            start=start,
            guidance_scale=args.guidance_scale,
            bytes_per_value=models.DTYPES[dtype],
            store=store,
            kernel=args.kernel,
        )

    stored, beside = cost_of(None), cost_of(None, "batch")
    sizes, geometry = model.sizes, model.geometry
    patch = "x".join(map(str, geometry.patch))
    print(
        f"model      {model.name}: {sizes.layers} blocks of {sizes.heads} heads x {sizes.head_dim}, "
        f"VAE stride {geometry.temporal_stride} in time and {geometry.spatial_stride} in space, patch {patch}"
    )
    print(f"video      {video.frames} frames of {video.width}x{video.height}: {tokens} tokens, {rows} of them locked")
    acts = f"the lock acts in the last {stored.locked_steps}" if stored.locked_steps else "no lock"
    most = ""
    if stored.locked_steps and model.experts == 2 and config.fusion == "variance":
        acts, most = f"{acts}, but not in the {MIN_HISTORY} after a change of transformer", "up to "
    part = f" of {args.steps} (strength {model.strength:g})" if start else ""
    print(f"steps      {stored.steps}{part}, {acts} (preset {args.preset})")
    print(f"forwards   {stored.forwards_plain} without KV-Lock")
    window = f"two rings of {config.window_steps(args.steps)} steps"
    predictions = f"           {_bytes(stored.bytes_predictions)} of clean predictions in float32: {window}"
    if not stored.locked_steps:
        print("memory     no source keys and values: nothing is locked")
        print(predictions)
        return
    calls = "both branches" if model.sizes.joint_branches else "each branch"
    for cost, how in ((stored, "the source runs once a step"), (beside, f"source='batch': it runs beside {calls}")):
        print(f"           {most}{cost.forwards} with it ({cost.forwards / cost.forwards_plain:.2f}x), {how}")
    print(f"memory     {_bytes(stored.bytes_background)} of source K and V at a time, background rows in {dtype}")
    for rows_in in ("model", "int8"):
        if rows_in != "model":
            print(f"           {_bytes(cost_of(Store(rows_in)).bytes_background)} in 8 bits (--rows int8 or fp8)")
        for place in PLACES:
            print(f"             --place {place:<7} {_where(cost_of(Store(rows_in, place=place)))}")
        cost = cost_of(Store(rows_in))
        recorded = f"{most}{_bytes(cost.bytes_recording)} on disk, {_bytes(cost.bytes_moved_replay)} moved in a step"
        print(f"             kvlock record   {recorded}")
    print(f"           {_bytes(stored.bytes_full)} if every row were kept; none with source='batch'")
    print(predictions)


def _sizes(args: argparse.Namespace, model: models.Model, dilate_tokens: int) -> tuple[Video, int, int]:
    """Video, tokens and background rows: of the given video and mask, or of the stated sizes."""
    stated = [args.frames, args.height, args.width]
    if args.video is not None or args.example is not None:
        if any(number is not None for number in (*stated, args.mask_share)):
            raise ValueError("--frames, --height, --width and --mask-share stand in for a video: leave them out")
        source = inputs.fit(inputs.read_source(args), model.geometry, trim=args.trim)
        masks = inputs.build_masks(source, model, dilate_tokens=dilate_tokens)
        return Video(*source.frames.shape[:3]), masks.num_tokens, masks.background_rows
    if any(side is None for side in stated):
        raise ValueError("no video; wanted --video with a mask, --example, or all of --frames, --height and --width")
    if args.mask is not None or args.mask_box is not None:
        raise ValueError("a mask goes with --video; wanted --mask-share beside --frames, --height and --width")
    for name, side in zip(Video._fields, stated, strict=True):
        inputs.check_range(name, side, LARGEST_SIDE)
    share = MASK_SHARE if args.mask_share is None else args.mask_share
    if not 0 <= share <= 1:
        raise ValueError(f"--mask-share {share} is out of range; wanted 0 to 1")
    tokens = _count_tokens(Video(*stated), model)
    return Video(*stated), tokens, tokens - round(share * tokens)


def _count_tokens(video: Video, model: models.Model) -> int:
    from kvlock.geometry import latent_frames

    geometry = model.geometry
    tokens = latent_frames(video.frames, geometry.temporal_stride) // geometry.patch[0]
    inputs.check_size(video.height, video.width, geometry)
    down, across = geometry.pixels_per_token
    return tokens * (video.height // down) * (video.width // across)


def _where(cost: Cost) -> str:
    """Where the bytes of a step are, and how many of them move."""
    places = {"on the device": cost.bytes_device, "on the host": cost.bytes_host, "on disk": cost.bytes_disk}
    named = [f"{_bytes(count)} {place}" for place, count in places.items() if count]
    return ", ".join(named + ([f"{_bytes(cost.bytes_moved)} moved in a step"] if cost.bytes_moved else []))


def _bytes(count: int) -> str:
    from kvlock.cost import byte_unit

    unit, name = byte_unit(count)
    return f"{count} {name}" if unit == 1 else f"{count / unit:.1f} {name}"
