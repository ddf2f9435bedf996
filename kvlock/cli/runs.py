"""What the commands that denoise share: their options, what these name, the weights, and a run under a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlock.cli import inputs, models

if TYPE_CHECKING:
    from kvlock.config import KVLockConfig
    from kvlock.pipeline import KVLockOutput
    from kvlock.recording import Recording
    from kvlock.store import Store


class Task(NamedTuple):
    """What to denoise, read and checked before any weight is loaded."""

    source: inputs.Source
    prompts: dict[str, str | None]
    settings: dict[str, Any]  # of the pipeline's call, prompts included
    recording: Recording | None = None  # of the source


def add_options(parser: argparse.ArgumentParser, *, edits: bool = True) -> None:
    """The options of a run, its settings of KV-Lock excepted; of one that only reads the source without `edits`."""
    inputs.add_options(parser)
    if edits:
        parser.add_argument("--prompt", help="what the edited video shows")
        parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument("--source-prompt", help="what the source shows; the lock is better with it")
    parser.add_argument(
        "--reference", metavar="PICTURE", type=inputs.path, nargs="+", help="pictures of what to put in (VACE models)"
    )
    inputs.add_steps_option(parser)
    if edits:
        inputs.add_guidance_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (0)")
    parser.add_argument("--dtype", choices=("auto", *models.DTYPES), default="auto")
    parser.add_argument("--device", default="auto", help="torch device (the GPU if there is one)")
    parser.add_argument("--offload", choices=("none", "model", "group"), default="none", help="what waits elsewhere")


def read(args: argparse.Namespace, config: KVLockConfig) -> Task:
    """Read and check everything that is cheap; only the weights are still missing then.

    Raises:
        ValueError: bad input.
    """
    source = inputs.read_source(args)
    return checked(args, config, source, _prompts(args, source), read_references(args))


def checked(
    args: argparse.Namespace,
    config: KVLockConfig,
    source: inputs.Source,
    prompts: dict[str, str | None],
    references: list[Any],
) -> Task:
    """What was read, checked against the model; raises ValueError where it does not fit."""
    model = models.describe(args.model)
    model.first_step(args.steps)
    source = inputs.fit(source, model.geometry, trim=args.trim)
    if references and not model.has_vace:
        raise ValueError(f"--reference needs a VACE model; {model.name} is none")
    inputs.build_masks(source, model, reference_frames=len(references), dilate_tokens=config.dilate_tokens)
    settings = {"num_inference_steps": args.steps, **prompts, "reference_images": references or None}
    if model.frame_rate is not None:
        if not source.names_rate:
            source = source._replace(fps=model.frame_rate)
        settings["frame_rate"] = source.fps
    return Task(source, prompts, settings)


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
    pipe: Any,
    config: KVLockConfig,
    task: Task,
    args: argparse.Namespace,
    *,
    kernel: str = "hooks",
    store: Store | None = None,
) -> KVLockOutput:
    """One edit under a progress bar."""
    from kvlock.pipeline import KVLockPipeline

    name = "plain" if config.passthrough else "kv-lock"
    edit = KVLockPipeline(pipe, config, kernel=kernel, store=store)
    settings = task.settings | {"guidance_scale": args.guidance_scale, "generator": generator(args.seed)}
    with progress(name, args.steps) as show:
        return edit(task.source.frames, task.source.mask, progress=show, recording=task.recording, **settings)


def generator(seed: int) -> Any:
    """Of the initial noise; on the CPU, so that a seed means the same on every device."""
    import torch

    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def progress(name: str, steps: int) -> Iterator[Any]:
    """A progress bar, and what is to be called after each step."""
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, unit="step") as bar:

        def show(step: int, num_steps: int, trace: Any) -> None:
            bar.total = num_steps  # of which a video-to-video pipeline runs a share only
            if len(trace):
                row = trace.latest()
                alpha, omega = row["fusion_ratio"][0], row["guidance_scale"][0]
                bar.set_postfix_str(f"alpha {alpha:.2f} omega {omega:.2f}", refresh=False)
            bar.update(step + 1 - bar.n)

        yield show


def another(scene: Any) -> Any:
    """The same scene with another shape, in a colour far from the first."""
    from kvlock.mini.scenes import COLOURS, SHAPES

    colours = tuple(COLOURS)
    return dataclasses.replace(
        scene,
        shape=SHAPES[SHAPES.index(scene.shape) - 1],
        colour=colours[colours.index(scene.colour) - len(colours) // 2],
    )


def source_prompt(args: argparse.Namespace, source: inputs.Source) -> str:
    """What the source shows, as far as it is known."""
    if args.source_prompt is None and source.scene is not None:
        return source.scene.caption
    return args.source_prompt or ""


def _prompts(args: argparse.Namespace, source: inputs.Source) -> dict[str, str | None]:
    prompt = args.prompt
    if source.scene is not None and prompt is None:
        prompt = another(source.scene).caption
    if prompt is None:
        raise ValueError("no prompt; wanted --prompt TEXT, or --example for a built-in edit")
    return {"prompt": prompt, "source_prompt": source_prompt(args, source), "negative_prompt": args.negative_prompt}


def read_references(args: argparse.Namespace) -> list[Any]:
    """The pictures that --reference names."""
    from PIL import Image

    from kvlock.pictures import read_picture

    # A cut-out goes on white, where KVLockPipeline lays it too.
    return [Image.fromarray(read_picture(path, background="white").numpy()) for path in args.reference or ()]


def _warn_of_unknown_words(tokenizer: Any, prompts: dict[str, str | None]) -> None:
    words = re.findall(r"\w+", " ".join(text for text in prompts.values() if text).lower())
    vocabulary = tokenizer.get_vocab()
    unknown = sorted({word for word in words if word not in vocabulary})
    if unknown:
        known = sorted(word for word in vocabulary if word.isalpha())
        inputs.notice(f"warning: the miniature does not know {', '.join(unknown)}; it knows {', '.join(known)}")
