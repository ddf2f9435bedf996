"""What one call of the pipeline is made of: video, mask and conditions, checked and in the form that it takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvlock.adapters.families import pipeline_class
from kvlock.adapters.vae import encode
from kvlock.geometry import Geometry, latent_frames, legal_frames
from kvlock.masks import Masks, binarize
from kvlock.pictures import laid_on

# Of the pipeline's call: they follow from the video and from what KVLockPipeline returns.
OWN_ARGUMENTS = {"height", "width", "num_frames", "num_videos_per_prompt", "output_type", "return_dict"}


class Job(NamedTuple):
    """What a call of the pipeline is made of."""

    arguments: dict[str, Any]
    masks: Masks
    source: Tensor  # latents, those of the references first
    pixels: Tensor  # [F, H, W, 3] fp32
    inside: Tensor  # [F, H, W] bool
    references: list[Tensor]  # [h, w, 3] uint8


def prepare(
    pipe: Any,
    video: Tensor,
    mask: Tensor,
    given: dict[str, Any],
    pipeline_arguments: dict[str, Any],
    *,
    source_prompt: str,
    reference_images: Sequence[Any] | None,
    trim: bool,
    dilate_tokens: int,
) -> Job:
    """Check everything that a call takes, and encode the source.

    Args:
        given: the pipeline's arguments prompt, guidance_scale, generator, num_inference_steps and output_type, and for
            an edit negative_prompt.
        pipeline_arguments: whatever else the call takes.

    Raises:
        ValueError: as `KVLockPipeline`.
    """
    pixels = _pixels(video)
    inside = binarize(mask).cpu()
    if inside.shape != pixels.shape[:3]:
        raise ValueError(
            f"mask has [F, H, W] = {list(inside.shape)}, the video {list(pixels.shape[:3])}; wanted them alike"
        )
    stride = Geometry.of(pipe).temporal_stride
    if trim:
        keep = legal_frames(len(pixels), stride)
        pixels, inside = pixels[:keep], inside[:keep]
    latent_frames(len(pixels), stride)
    _check_given(given, source_prompt)
    references = references_of(reference_images)
    arguments = _accepted(pipe, pipeline_arguments, given) | _conditions(pipe, pixels, inside, references)
    if "strength" in _parameters(pipe):
        _check_strength(pipe, arguments, given["num_inference_steps"])
    masks = Masks.from_pixels(inside, pipe, reference_frames=len(references), dilate_tokens=dilate_tokens)
    _, height, width = inside.shape
    source = encode_source(pipe, pixels)
    if references:
        source = torch.cat([*_reference_latents(pipe, references, height, width), source], dim=2)
    pictures = [torch.from_numpy(np.array(image)) for image in references]
    return Job(arguments | {"height": height, "width": width} | given, masks, source, pixels, inside, pictures)


def encode_source(pipe: Any, video: Tensor) -> Tensor:
    """The latents that `kvlock.attach` takes for a source video: [1, C, T, h, w] fp32, normalised as the pipeline does.

    Args:
        video: [F, H, W, 3], uint8 or floating point in [0, 1]; F = s * n + 1 with the VAE's stride s in time.

    Raises:
        ValueError: the video has another shape, dtype or range.
    """
    return encode(pipe, _pixels(video).movedim(-1, 1) * 2 - 1)


def _pixels(video: Tensor) -> Tensor:
    """[F, H, W, 3] fp32 in [0, 1], on the CPU."""
    if not isinstance(video, Tensor):
        raise ValueError(f"video is a {type(video).__name__}; wanted a tensor [F, H, W, 3]")
    shape = list(video.shape)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"video has shape {shape}; wanted a tensor [F, H, W, 3]")
    if video.dtype == torch.uint8:
        return video.cpu().float() / 255
    if not video.is_floating_point():
        raise ValueError(f"video has dtype {video.dtype}; wanted uint8, or floating point in [0, 1]")
    low, high = video.min().item(), video.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"video has values from {low:g} to {high:g}; wanted floating point in [0, 1]")
    return video.cpu().float()


def _check_given(given: dict[str, Any], source_prompt: Any) -> None:
    """Refuse values that the pipeline would not name, or would take for something else."""
    for name, text in (("prompt", given["prompt"]), ("source_prompt", source_prompt)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}; wanted one str")
    guidance_scale, generator, steps = (given[name] for name in ("guidance_scale", "generator", "num_inference_steps"))
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
        raise ValueError(f"guidance_scale={guidance_scale!r} is not allowed; wanted a finite number")
    if generator is not None and not isinstance(generator, torch.Generator | list | tuple):
        raise ValueError(f"generator is a {type(generator).__name__}; wanted a torch.Generator")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps={steps!r} is not allowed; wanted an int >= 1")


def _check_strength(pipe: Any, arguments: dict[str, Any], steps: int) -> None:
    """Wants a pipeline that runs a share of its steps to have one left; raises ValueError as `first_step`."""
    strength = arguments.get("strength", _parameters(pipe)["strength"].default)
    count, named = steps, f"num_inference_steps={steps}"
    if arguments.get("timesteps") is not None:
        count = len(arguments["timesteps"])
        named = f"timesteps of length {count}"
    first_step(count, strength, f"{named} at {strength=}")


def first_step(num_steps: int, strength: float, named: str) -> int:
    """Index at which a pipeline that runs the last `strength` of `num_steps` enters them, counted as it does.

    Args:
        named: the settings, for the message.

    Raises:
        ValueError: no step is left.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < math.inf:
        raise ValueError(f"strength={strength!r} is not allowed; wanted a number > 0")
    first = num_steps - min(int(num_steps * strength), num_steps)
    if first == num_steps:
        raise ValueError(
            f"{named} leaves none to a pipeline that runs the last {strength:g} of them; "
            f"wanted {math.ceil(1 / strength)} or more"
        )
    return first


def references_of(images: Any) -> list[Image.Image]:
    """The reference images of one video, RGB: of one, of a list, or of a list in a list, as diffusers takes them.

    A cut-out goes on white, with which the pipeline also surrounds a reference that does not fill the picture.

    Raises:
        ValueError: there is something else in them, or they are for several videos.
    """
    found = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if found and all(isinstance(item, list | tuple) for item in found):
        if len(found) > 1:
            raise ValueError(f"reference_images has lists for {len(found)} videos; wanted one")
        found = list(found[0])
    for image in found:
        if not isinstance(image, Image.Image):
            raise ValueError(f"reference_images holds a {type(image).__name__}; wanted PIL images")
    return [laid_on("white", image).convert("RGB") for image in found]


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes, read off the class in the table: a subclass may only pass it on."""
    return inspect.signature(pipeline_class(pipe).__call__).parameters


def _accepted(pipe: Any, arguments: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    known = _parameters(pipe)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}")
    taken = sorted(set(arguments) & (OWN_ARGUMENTS | set(given)))
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be given: KVLockPipeline decides it")
    return dict(arguments)


def sequence_length(pipe: Any, arguments: dict[str, Any]) -> dict[str, int]:
    """The source prompt is padded as the pipeline pads the prompt, whose default `encode_prompt` does not share."""
    default = _parameters(pipe)["max_sequence_length"].default
    return {"max_sequence_length": arguments.get("max_sequence_length", default)}


def _conditions(pipe: Any, pixels: Tensor, inside: Tensor, references: list[Any]) -> dict[str, Any]:
    """What the pipeline is told of the source: VACE gets it with the masked pixels grey, V2V as it is, T2V nothing."""
    parameters = _parameters(pipe)
    given: dict[str, Any] = {}
    if "num_frames" in parameters:
        given["num_frames"] = len(pixels)
    if "video" in parameters:
        filled = pixels
        if "mask" in parameters:
            # VACE encodes the masked pixels as "reactive" control: left in, they hand it the object to be replaced.
            filled = torch.where(inside[..., None], 0.5, pixels)
            given["mask"] = inside[None, :, None].float()
        given["video"] = filled.movedim(-1, 1)[None]
    if references:
        if "reference_images" not in parameters:
            raise ValueError(f"{type(pipe).__name__} takes no reference_images; wanted a VACE pipeline")
        given["reference_images"] = references
    return given


def _reference_latents(pipe: Any, references: list[Any], height: int, width: int) -> list[Tensor]:
    """Each reference image's own clean latents, [1, C, 1, h, w], fitted to the picture as the pipeline does."""
    blank = torch.zeros(1, 1, 3, height, width)
    device = pipe._execution_device
    _, _, images = pipe.preprocess_conditions(blank, blank, references, 1, height, width, 1, torch.float32, device)
    return [encode(pipe, image[None]) for image in images[0]]
