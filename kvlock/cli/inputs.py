"""What the commands share: their input options, and the video, mask and model that these name."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from torch import Tensor

    from kvlock.cost import ModelSizes
    from kvlock.geometry import Geometry
    from kvlock.masks import Masks
    from kvlock.mini.scenes import Scene

HELD_OUT = 10**6  # the miniature was trained on the scenes of smaller seeds
EXAMPLE_FPS = 8.0
EXAMPLE_SCENE = 15  # a green square over stripes, which the edit turns into an orange circle


class Source(NamedTuple):
    """The video to edit and where to edit it."""

    frames: Tensor  # uint8 [F, H, W, 3]
    mask: Tensor  # bool [F, H, W], True = edit
    fps: float
    scene: Scene | None = None  # of the example


class Model(NamedTuple):
    """What a model's configuration says, known before any weight is loaded."""

    name: str
    geometry: Geometry
    sizes: ModelSizes
    has_vace: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name video, mask and model."""
    parser.add_argument("--video", metavar="PATH", help="video file or folder of pictures to edit")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--mask", metavar="PATH", help="mask video, folder or single picture; white = edit")
    where.add_argument("--mask-box", metavar="X0,Y0,X1,Y1", help="a still box in pixels instead of a mask")
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="diffusers model; without it, the embedded miniature")
    parser.add_argument("--trim", action="store_true", help="drop the last frames of a video whose length does not fit")
    parser.add_argument(
        "--example",
        metavar="N",
        type=_count,
        nargs="?",
        const=EXAMPLE_SCENE,
        help="use held-out scene N (default %(const)s) of the miniature's world instead of --video and --mask",
    )


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; wanted a whole number >= 0")
    return int(text)


def notice(message: str) -> None:
    """One line of information beside the output."""
    print(f"kvlock: {message}", file=sys.stderr)


def input_paths(args: argparse.Namespace) -> list[Path]:
    """Every file or folder the command reads, so that no output is written over it."""
    named = [args.video, args.mask, *(getattr(args, "reference", None) or ())]
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
    return Source(frames, mask, fps)


def _render_example(number: int) -> Source:
    from kvlock.mini import scenes
    from kvlock.video import to_uint8

    scene = scenes.sample(HELD_OUT + number)
    return Source(to_uint8(scenes.render(scene)), scenes.box_mask(scene), EXAMPLE_FPS, scene)


def fit(source: Source, geometry: Geometry, *, trim: bool) -> Source:
    """Check a video's size and length against the model's, and drop trailing frames where that was asked for.

    Raises:
        ValueError: the size or the length does not fit; the message names those that do.
    """
    from kvlock.geometry import latent_frames

    count, height, width, _ = source.frames.shape
    check_size(height, width, geometry)
    kept = 1 + (count - 1) // geometry.temporal_stride * geometry.temporal_stride
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
    for name, size, base in zip(("height", "width"), (height, width), geometry.pixels_per_token, strict=True):
        if size < base or size % base:
            below = max(1, size // base) * base
            raise ValueError(
                f"video {name} is {size}; wanted a multiple of {base}, such as {below} or {below + base} "
                "(crop or scale it first: nothing is resampled here)"
            )


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


def describe(model: str | None) -> Model:
    """Read a model's configuration; None is the embedded miniature.

    Raises:
        ValueError: there is no such model, it is no diffusers pipeline, or its transformer is not supported.
    """
    from kvlock.adapters.families import FAMILIES
    from kvlock.cost import ModelSizes
    from kvlock.geometry import Geometry

    transformer, vae = (_read_config(model, part) for part in ("transformer", "vae"))
    name = transformer._class_name
    if name not in FAMILIES:
        raise ValueError(f"transformer {name} is not supported; supported transformers: {', '.join(FAMILIES)}")
    parts = SimpleNamespace(transformer=SimpleNamespace(config=transformer), vae=SimpleNamespace(config=vae))
    return Model(
        name=model or "embedded miniature",
        geometry=Geometry.of(parts),
        sizes=ModelSizes.of(transformer),
        has_vace=getattr(transformer, "vace_layers", None) is not None,
    )


def _read_config(model: str | None, part: str) -> SimpleNamespace:
    """A part's configuration, completed by the defaults of its class as loading it would."""
    path = _config_path(model, part)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        import diffusers

        defaults = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters.values()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a diffusers model") from error
    known = {parameter.name: parameter.default for parameter in defaults if parameter.default is not parameter.empty}
    return SimpleNamespace(**(known | config))


def _config_path(model: str | None, part: str) -> Path:
    file = Path(part) / "config.json"
    if model is None:
        from kvlock import mini

        folder = mini.PATH
    else:
        folder = Path(model)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ValueError(f"model {folder} has no {file}; wanted the folder of a diffusers pipeline")
        return folder / file
    if model is None:
        raise ValueError(f"the embedded miniature is not installed: {folder} is missing; name another with --model")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"model {folder} does not exist; wanted the folder of a diffusers pipeline or a Hub id a/b")
    return _fetch(model, file)


def _fetch(model: str, file: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, file.as_posix()))
    except Exception as error:  # whatever the connection, the Hub or its cache objects to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model {model} is no folder, and the Hub does not give its {file}: {reason[0]}") from error


def load_pipeline(model: str | None, *, dtype: str, device: str, offload: str) -> Any:
    """Load the weights onto a device; the VAE stays in float32.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU, but float32 for the miniature.
        device: a torch device, or "auto": the GPU if there is one.
        offload: "none", "model" (one component on the device at a time) or "group" (one layer at a time).

    Raises:
        ValueError: the model cannot be loaded, or the device is not there.
    """
    import torch

    target = resolve_device(device)
    precision = getattr(torch, resolve_dtype(dtype, model, target.type))
    if model is None:
        from kvlock import mini

        # Loading in another precision keeps the layers that need float32 in it, which a later cast would not.
        pipe = mini.load() if precision is torch.float32 else _from_pretrained(str(mini.PATH), precision)
    else:
        pipe = _from_pretrained(model, precision)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=target, offload_type="leaf_level", use_stream=target.type == "cuda")
    else:
        pipe.to(target)
    return pipe


def resolve_device(device: str) -> Any:
    """The torch device of this name.

    Raises:
        ValueError: torch knows no such device, or there is none.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).strip().splitlines()[0]}") from error
    return target


def resolve_dtype(dtype: str, model: str | None, device_type: str) -> str:
    """The name of the torch dtype the transformer runs in."""
    if dtype != "auto":
        return dtype
    return "float32" if model is None or device_type == "cpu" else "bfloat16"


def _from_pretrained(model: str, precision: Any) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            # Newer versions call it dtype and say so; the older name works in all that are supported.
            warnings.simplefilter("ignore", FutureWarning)
            return DiffusionPipeline.from_pretrained(model, torch_dtype={"default": precision, "vae": torch.float32})
    except Exception as error:  # missing files, parts of other libraries, the connection: all are one bad model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot load model {model}: {reason[0]}") from error
