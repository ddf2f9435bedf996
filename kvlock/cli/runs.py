"""What the commands that denoise share: their options, what these name, the weights, and a run under a progress bar."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlock.cli import inputs, models

if TYPE_CHECKING:
    from kvlock.config import KVLockConfig
    from kvlock.pipeline import KVLockOutput


class Task(NamedTuple):
    """What to denoise, read and checked before any weight is loaded."""

    source: inputs.Source
    prompts: dict[str, str | None]
    settings: dict[str, Any]  # of the pipeline's call, prompts included


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run, its settings of KV-Lock excepted."""
    inputs.add_options(parser)
    parser.add_argument("--prompt", help="what the edited video shows")
    parser.add_argument("--source-prompt", help="what the source shows; the lock is better with it")
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument(
        "--reference", metavar="PICTURE", type=inputs.path, nargs="+", help="pictures of what to put in (VACE models)"
    )
    inputs.add_run_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (%(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="torch device (the GPU if there is one)")
    parser.add_argument("--offload", choices=("none", "model", "group"), default="none", help="what waits elsewhere")


def read(args: argparse.Namespace, config: KVLockConfig) -> Task:
    """Read and check everything that is cheap; only the weights are still missing then.

    Raises:
        ValueError: bad input.
    """
    source = inputs.read_source(args)
    prompts = _prompts(args, source)
    references = [_read_reference(path) for path in args.reference or ()]
    model = models.describe(args.model)
    model.first_step(args.steps)
    source = inputs.fit(source, model.geometry, trim=args.trim)
    if references and not model.has_vace:
        raise ValueError(f"--reference needs a VACE model; {model.name} is none")
    inputs.build_masks(source, model, reference_frames=len(references), dilate_tokens=config.dilate_tokens)
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, **prompts}
    return Task(source, prompts, settings | {"reference_images": references or None})


def load(args: argparse.Namespace, task: Task) -> Any:
    """The pipeline, on its device.

    Raises:
        ValueError: as `models.load_pipeline`.
    """
    pipe = models.load_pipeline(args.model, dtype=args.dtype, device=args.device, offload=args.offload)
    if args.model is None:
        _warn_of_unknown_words(pipe.tokenizer, task.prompts)
    return pipe


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

        def show(step: int, num_steps: int, trace: Any) -> None:
            bar.total = num_steps  # of which a video-to-video pipeline runs a share only
            if len(trace):
                row = trace.latest()
                alpha, omega = row["fusion_ratio"][0], row["guidance_scale"][0]
                bar.set_postfix_str(f"alpha {alpha:.2f} omega {omega:.2f}", refresh=False)
            bar.update(step + 1 - bar.n)

        return KVLockPipeline(pipe, config)(source.frames, source.mask, generator=generator, progress=show, **settings)


def another(scene: Any) -> Any:
    """The same scene with another shape, in a colour far from the first."""
    from kvlock.mini.scenes import COLOURS, SHAPES

    colours = tuple(COLOURS)
    return dataclasses.replace(
        scene,
        shape=SHAPES[SHAPES.index(scene.shape) - 1],
        colour=colours[colours.index(scene.colour) - len(colours) // 2],
    )


def _prompts(args: argparse.Namespace, source: inputs.Source) -> dict[str, str | None]:
    prompt, source_prompt = args.prompt, args.source_prompt
    if source.scene is not None:
        source_prompt = source.scene.caption if source_prompt is None else source_prompt
        prompt = another(source.scene).caption if prompt is None else prompt
    if prompt is None:
        raise ValueError("no prompt; wanted --prompt TEXT, or --example for a built-in edit")
    return {"prompt": prompt, "source_prompt": source_prompt or "", "negative_prompt": args.negative_prompt}


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
