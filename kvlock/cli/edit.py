"""kvlock edit: change what the mask marks, as the prompt says, and leave the rest of the video alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlock.cli import inputs, models, outputs

if TYPE_CHECKING:
    from torch import Tensor

    from kvlock.config import KVLockConfig
    from kvlock.pipeline import KVLockOutput
    from kvlock.report import BackgroundReport

DEFAULT_OUT = "kvlock-out/out.mp4"
BESIDE = ("side-by-side.mp4", "trace.json", "variance.png", "schedule.png", "source_bytes.png")
BESIDE_EXAMPLE = ("source.mp4", "mask.mp4", "plain.mp4", "comparison.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    inputs.add_options(parser)
    parser.add_argument("--prompt", help="what the edited video shows")
    parser.add_argument("--source-prompt", help="what the source shows; the lock is better with it")
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument(
        "--reference", metavar="PICTURE", type=inputs.path, nargs="+", help="pictures of what to put in (VACE models)"
    )
    parser.add_argument("--out", metavar="PATH", type=Path, default=Path(DEFAULT_OUT), help="default: %(default)s")
    inputs.add_run_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (%(default)s)")
    parser.add_argument("--background-guidance", type=float, help="guidance outside the mask, such as 1")
    parser.add_argument("--composite", choices=("none", "latent", "pixel"), help="paste the source's background back")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="torch device (the GPU if there is one)")
    parser.add_argument("--offload", choices=("none", "model", "group"), default="none", help="what waits elsewhere")


def run(args: argparse.Namespace) -> None:
    """Edit, measure, and write everything at once at the end.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    started = time.perf_counter()
    config = _settings(args)
    beside = BESIDE + (BESIDE_EXAMPLE if args.example is not None else ())
    outputs.check(args.out, beside, inputs.input_paths(args))
    # Read and check everything that is cheap before the weights are loaded.
    source = inputs.read_source(args)
    prompts = _prompts(args, source)
    references = [_read_reference(path) for path in args.reference or ()]
    model = models.describe(args.model)
    source = inputs.fit(source, model.geometry, trim=args.trim)
    if references and not model.has_vace:
        raise ValueError(f"--reference needs a VACE model; {model.name} is none")
    inputs.build_masks(source, model, reference_frames=len(references), dilate_tokens=config.dilate_tokens)

    pipe = models.load_pipeline(args.model, dtype=args.dtype, device=args.device, offload=args.offload)
    if args.model is None:
        _warn_of_unknown_words(pipe.tokenizer, prompts)
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, **prompts}
    settings |= {"reference_images": references or None}
    edits = {args.preset: denoise(pipe, config, source, args.seed, settings)}
    if args.example is not None and args.preset != "plain":
        from kvlock.config import preset

        edits["plain"] = denoise(pipe, preset("plain"), source, args.seed, settings)
    measures = measure(pipe, source, {name: edit.frames for name, edit in edits.items()})
    trace = _trace_dict(args, config, edits[args.preset], measures, prompts, source, started)
    with outputs.staged(args.out.parent) as folder:
        _write(folder, args, config, source, edits, measures, trace)
    _print_summary(args, trace, measures)


def _settings(args: argparse.Namespace) -> KVLockConfig:
    from kvlock.config import preset

    inputs.check_run_options(args)
    if abs(args.seed) > inputs.LARGEST_SEED:
        raise ValueError(f"--seed {args.seed} is out of range; wanted at most {inputs.LARGEST_SEED} in size")
    changes = {"background_guidance": args.background_guidance, "composite": args.composite}
    return preset(args.preset, **{name: value for name, value in changes.items() if value is not None})


def _prompts(args: argparse.Namespace, source: inputs.Source) -> dict[str, str | None]:
    prompt, source_prompt = args.prompt, args.source_prompt
    if source.scene is not None:
        source_prompt = source.scene.caption if source_prompt is None else source_prompt
        prompt = another(source.scene).caption if prompt is None else prompt
    if prompt is None:
        raise ValueError("no prompt; wanted --prompt TEXT, or --example for a built-in edit")
    if source_prompt is None:
        inputs.notice('no --source-prompt: the source runs with "" (a description of it locks better)')
    return {"prompt": prompt, "source_prompt": source_prompt or "", "negative_prompt": args.negative_prompt}


def another(scene: Any) -> Any:
    """The same scene with another shape, in a colour far from the first."""
    from kvlock.mini.scenes import COLOURS, SHAPES

    colours = tuple(COLOURS)
    return dataclasses.replace(
        scene,
        shape=SHAPES[SHAPES.index(scene.shape) - 1],
        colour=colours[colours.index(scene.colour) - len(colours) // 2],
    )


def _read_reference(path: str) -> Any:
    from PIL import Image

    from kvlock.pictures import read_picture

    # A cut-out goes on white, with which the pipeline also surrounds a reference that does not fill the picture.
    return Image.fromarray(read_picture(path, background="white").numpy())


def _warn_of_unknown_words(tokenizer: Any, prompts: dict[str, str | None]) -> None:
    words = re.findall(r"\w+", " ".join(text for text in prompts.values() if text).lower())
    vocabulary = tokenizer.get_vocab()
    unknown = sorted({word for word in words if word not in vocabulary})
    if unknown:
        known = sorted(word for word in vocabulary if word.isalpha())
        inputs.notice(f"warning: the miniature does not know {', '.join(unknown)}; it knows {', '.join(known)}")


def denoise(
    pipe: Any, config: KVLockConfig, source: inputs.Source, seed: int, settings: dict[str, Any]
) -> KVLockOutput:
    """One edit under a progress bar."""
    import torch
    from tqdm import tqdm

    from kvlock.pipeline import KVLockPipeline

    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every device
    name = "plain" if config.passthrough else "kv-lock"
    with tqdm(total=settings["num_inference_steps"], desc=name, unit="step") as bar:

        def show(step: int, _num_steps: int, trace: Any) -> None:
            if len(trace):
                row = trace.latest()
                alpha, omega = row["fusion_ratio"][0], row["guidance_scale"][0]
                bar.set_postfix_str(f"alpha {alpha:.2f} omega {omega:.2f}", refresh=False)
            bar.update(step + 1 - bar.n)

        return KVLockPipeline(pipe, config)(source.frames, source.mask, generator=generator, progress=show, **settings)


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
    config: KVLockConfig,
    edit: KVLockOutput,
    measures: dict[str, BackgroundReport],
    prompts: dict[str, str | None],
    source: inputs.Source,
    started: float,
) -> dict[str, Any]:
    frames, height, width, _ = source.frames.shape
    trace = edit.trace.to_dict()
    trace["summary"] |= {
        "composite": config.composite,
        "background": {name: report.to_dict() for name, report in measures.items()},
        "tokens": edit.masks.num_tokens,
        "background_rows": edit.masks.background_rows,
        "seconds": round(time.perf_counter() - started, 2),
    }
    trace["input"] = {
        "model": args.model or "embedded miniature",
        "example": args.example,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": source.fps,
        "preset": args.preset,
        "seed": args.seed,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "references": args.reference or [],
        **prompts,
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
    locked = summary["locked_steps"] if trace["config"]["fusion"] != "off" else 0
    print(f"lock        locked {locked} of {summary['steps'] or args.steps} steps")
    print(f"composite   {summary['composite']}")
    print(f"time        {summary['seconds']:.1f} s for {summary['forwards']} rows through the transformer")
