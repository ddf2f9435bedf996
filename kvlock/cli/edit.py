"""kvlock edit: change what the mask marks, as the prompt says, and leave the rest of the video alone."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlock.cli import inputs, outputs, replay, runs

if TYPE_CHECKING:
    from torch import Tensor

    from kvlock.config import KVLockConfig
    from kvlock.pipeline import KVLockOutput
    from kvlock.report import BackgroundReport

DEFAULT_OUT = "kvlock-out/out.mp4"
BESIDE = ("side-by-side.mp4", "trace.json", "variance.png", "schedule.png", "source_bytes.png")
BESIDE_EXAMPLE = ("source.mp4", "mask.mp4", "plain.mp4", "comparison.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    runs.add_options(parser)
    parser.add_argument(
        "--source", metavar="PATH", type=inputs.path, help="a recording (kvlock record), in place of --video and --mask"
    )
    inputs.add_preset_option(parser)
    inputs.add_store_options(parser)
    places = ("device", "host", "disk")
    parser.add_argument("--place", choices=places, default="device", help="where the source's rows wait (device)")
    parser.add_argument("--tau", type=float, help="variance at which the lock is full; kvlock calibrate proposes some")
    parser.add_argument("--out", metavar="PATH", type=Path, default=Path(DEFAULT_OUT), help="default: %(default)s")
    parser.add_argument("--background-guidance", type=float, help="guidance outside the mask, such as 1")
    parser.add_argument("--composite", choices=("none", "latent", "pixel"), help="paste the source's background back")
    replay.leave_open(parser)


def run(args: argparse.Namespace) -> None:
    """Edit, measure, and write everything at once at the end.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    from kvlock.store import Store

    config = _settings(args)
    beside = BESIDE + (BESIDE_EXAMPLE if args.example is not None else ())
    outputs.check(args.out, beside, inputs.input_paths(args))
    task = runs.read(args, config) if args.source is None else replay.task(args, config)
    pipe = runs.load(args, task)
    source = task.source
    store = Store(args.rows, place=args.place)
    started = time.perf_counter()
    edits = {args.preset: runs.denoise(pipe, config, task, args, kernel=args.kernel, store=store)}
    seconds = time.perf_counter() - started
    if args.example is not None and args.preset != "plain":
        from kvlock.config import preset

        edits["plain"] = runs.denoise(pipe, preset("plain"), task, args)
    measures = measure(pipe, source, {name: edit.frames for name, edit in edits.items()})
    trace = _trace_dict(args, edits[args.preset], measures, task, seconds)
    with outputs.staged(args.out.parent) as folder:
        _write(folder, args, config, source, edits, measures, trace)
    _print_summary(args, trace, measures)
    _tell_of_an_example(args)


def _settings(args: argparse.Namespace) -> KVLockConfig:
    from kvlock.config import preset

    if args.source is None:
        replay.fill_in(args)
    inputs.check_run_options(args)
    changes = {name: getattr(args, name) for name in ("tau", "background_guidance", "composite")}
    config = preset(args.preset, **{name: value for name, value in changes.items() if value is not None})
    if args.tau is not None and config.fusion != "variance" and not config.dynamic_guidance:
        raise ValueError(
            f"--tau {args.tau} has no effect with --preset {args.preset}, which follows no variance; leave it out"
        )
    return config


def measure(pipe: Any, source: inputs.Source, edits: dict[str, Tensor]) -> dict[str, BackgroundReport]:
    """The background report of each edit, and of the source's round trip through the VAE, the best that one can get."""
    from kvlock.adapters.vae import decode, encode
    from kvlock.report import background_report

    pixels = source.frames.movedim(-1, 1).float() / 127.5 - 1
    round_trip = (decode(pipe, encode(pipe, pixels)).cpu().movedim(1, -1) + 1) / 2
    videos = {**edits, "vae_round_trip": round_trip}
    return {name: background_report(source.frames.float() / 255, video, source.mask) for name, video in videos.items()}


def _trace_dict(
    args: argparse.Namespace,
    edit: KVLockOutput,
    measures: dict[str, BackgroundReport],
    task: runs.Task,
    seconds: float,
) -> dict[str, Any]:
    frames, height, width, _ = task.source.frames.shape
    trace = edit.trace.to_dict()
    trace["summary"] |= {
        "background": {name: report.to_dict() for name, report in measures.items()},
        "tokens": edit.masks.num_tokens,
        "background_rows": edit.masks.background_rows,
        "seconds": round(seconds, 2),  # of this edit alone, from source frames to edited ones
    }
    trace["input"] = {
        "model": args.model or "embedded miniature",
        "example": args.example,
        "recording": args.source,
        "kernel": args.kernel,
        "rows": args.rows if task.recording is None else task.recording.fields["rows"]["dtype"],
        "place": args.place if task.recording is None else "recording",
        "frames": frames,
        "height": height,
        "width": width,
        "fps": task.source.fps,
        "preset": args.preset,
        "seed": args.seed,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "references": args.reference or [],
        **task.prompts,
    }
    return trace


def _write(
    folder: Path,
    args: argparse.Namespace,
    config: KVLockConfig,
    source: inputs.Source,
    edits: dict[str, KVLockOutput],
    measures: dict[str, BackgroundReport],
    trace: dict[str, Any],
) -> None:
    from kvlock import plots, video

    frames = {name: edit.frames for name, edit in edits.items()}
    edited = frames[args.preset]
    video.write_video(folder / args.out.name, edited, source.fps)
    video.write_video(
        folder / "side-by-side.mp4", video.side_by_side(source.frames, source.mask, video.to_uint8(edited)), source.fps
    )
    (folder / "trace.json").write_text(json.dumps(trace, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plots.plot_variance(trace, folder / "variance.png")
    plots.plot_schedule(trace, folder / "schedule.png")
    plots.plot_source_bytes(trace, folder / "source_bytes.png")
    if args.example is None:
        return
    video.write_video(folder / "source.mp4", source.frames, source.fps)
    video.write_video(folder / "mask.mp4", source.mask[..., None].expand_as(source.frames).float(), source.fps)
    video.write_video(folder / "plain.mp4", frames["plain"], source.fps)
    labels = {args.preset: _title(args, config), "plain": "plain edit"}
    rows = {f"{labels[name]}: background {_decibels(measures[name])}": frames[name] for name in ("plain", args.preset)}
    title = f"source: {trace['input']['source_prompt']}      →      {trace['input']['prompt']}"
    plots.contact_sheet(source.frames, rows, source.mask, folder / "comparison.png", title=title)


def _title(args: argparse.Namespace, config: KVLockConfig) -> str:
    title = "KV-Lock edit" if args.preset == "kv-lock" else f"edit with preset {args.preset}"
    if config.background_guidance is not None:
        title += f", background guidance {config.background_guidance:g}"
    return title if config.composite == "none" else f"{title}, {config.composite} composite"


def _decibels(report: BackgroundReport) -> str:
    similarity = "none" if math.isnan(report.ssim) else f"{report.ssim:.3f}"
    return f"PSNR {report.psnr:.2f} dB, SSIM {similarity}; inside the mask {report.change_inside:.3f} changed"


def _print_summary(args: argparse.Namespace, trace: dict[str, Any], measures: dict[str, BackgroundReport]) -> None:
    summary = trace["summary"]
    written = BESIDE + (BESIDE_EXAMPLE if args.example is not None else ())
    print(f"wrote       {args.out}")
    print(f"beside it   {', '.join(written)}")
    for name, report in measures.items():
        label = "VAE alone" if name == "vae_round_trip" else name
        print(f"background  {_decibels(report)} ({label})")
    print(f"lock        locked {summary['locked_steps']} of {summary['steps']} steps")
    print(f"composite   {summary['composite']}")
    rows = f"{summary['forwards']} rows through the transformer"
    print(f"time        {summary['seconds']:.1f} s for this edit, text encoder and VAE included: {rows}")


def _tell_of_an_example(args: argparse.Namespace) -> None:
    """Says which files beside the edit are not its own, where all of an earlier example's are.

    They stay: a name does not tell whose a file is.
    """
    folder, old = args.out.parent, [name for name in BESIDE_EXAMPLE if name != args.out.name]
    if args.example is None and all((folder / name).exists() for name in old):
        inputs.notice(f"{', '.join(old)} in {folder} are of an earlier edit --example, not of this edit")
