"""From a video, a mask and a prompt to an edited video: a thin layer over an unmodified diffusers pipeline."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock.adapters.attach import attach, check_store, notice_empty_prompt
from kvlock.adapters.families import PIPELINES, check_pipeline
from kvlock.adapters.kernels import check_kernel
from kvlock.adapters.vae import encode, repair_stride
from kvlock.config import KVLockConfig
from kvlock.geometry import latent_frames, legal_frames
from kvlock.masks import Masks, binarize
from kvlock.store import Store
from kvlock.trace import Trace

# Of the pipeline's call: they follow from the video and from what KVLockPipeline returns.
OWN_ARGUMENTS = {"height", "width", "num_frames", "num_videos_per_prompt", "output_type", "return_dict"}


class KVLockOutput(NamedTuple):
    """An edited video and how it came about."""

    frames: Tensor  # [F, H, W, 3] fp32 in [0, 1], on the CPU
    trace: Trace
    masks: Masks


class KVLockPipeline:
    """Edit videos with `pipe`, a Wan VACE, T2V or V2V pipeline of diffusers, under one set of settings.

    `kernel` and `store` are `attach`'s: where the lock acts, and how source rows are stored.
    """

    def __init__(
        self, pipe: Any, config: KVLockConfig | None = None, *, kernel: str = "hooks", store: Store | None = None
    ) -> None:
        check_kernel(kernel)
        self.pipe = pipe
        self.kernel = kernel
        self.store = Store() if store is None else store
        self.config = KVLockConfig() if config is None else config
        if not isinstance(self.config, KVLockConfig):
            raise ValueError(f"config is a {type(config).__name__}; wanted a kvlock.KVLockConfig")
        check_store(self.store, self.config, kernel)
        check_pipeline(pipe)
        repair_stride(pipe)

    @torch.no_grad()
    def __call__(
        self,
        video: Tensor,
        mask: Tensor,
        prompt: str,
        *,
        source_prompt: str = "",
        negative_prompt: str | None = None,
        reference_images: Sequence[Any] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: torch.Generator | None = None,
        composite: str | None = None,
        trim: bool = False,
        progress: Callable[[int, int, Trace], None] | None = None,
        **pipeline_arguments: Any,
    ) -> KVLockOutput:
        """Change what the mask marks, as the prompt says, and leave the rest alone.

        Args:
            video: [F, H, W, 3], uint8 or floating point in [0, 1]; F = 4n + 1, H and W multiples of a token's side.
            mask: [F, H, W], bool, uint8 in 0..255 or floating point in 0..1; above one half = edit.
            prompt: what the edited video shows.
            source_prompt: what the source shows; "" works and is noticed, a description locks better.
            negative_prompt: what to steer away from; None is the pipeline's own default.
            reference_images: PIL images for VACE.
            num_inference_steps: denoising steps, >= 1.
            guidance_scale: the pipeline's; above 1 it runs an unconditional branch, and the config's own
                `guidance_scale`, where set, then takes its place.
            generator: of the initial noise; None draws from torch's own.
            composite: overrides the config's: "none", "latent" or "pixel" (the source's own pixels outside the mask).
            trim: drop trailing frames down to 4n + 1 instead of refusing the video.
            progress: called after every step with (step, steps, trace).
            pipeline_arguments: anything else the pipeline's call takes.

        Raises:
            ValueError: video, mask, prompt or a setting cannot be used; the message says why.
        """
        pipe = self.pipe
        config = self.config if composite is None else dataclasses.replace(self.config, composite=composite)
        pixels = _pixels(video)
        inside = binarize(mask).cpu()
        if inside.shape != pixels.shape[:3]:
            raise ValueError(
                f"mask has [F, H, W] = {list(inside.shape)}, the video {list(pixels.shape[:3])}; wanted them alike"
            )
        if trim:
            keep = legal_frames(len(pixels), pipe.vae_scale_factor_temporal)
            pixels, inside = pixels[:keep], inside[:keep]
        latent_frames(len(pixels), pipe.vae_scale_factor_temporal)
        for name, text in (("prompt", prompt), ("source_prompt", source_prompt)):
            if not isinstance(text, str):
                raise ValueError(f"{name} is a {type(text).__name__}; wanted one str")
        references = _as_list(reference_images)
        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
            raise ValueError(f"guidance_scale={guidance_scale!r} is not allowed; wanted a finite number")
        if generator is not None and not isinstance(generator, torch.Generator | list | tuple):
            raise ValueError(f"generator is a {type(generator).__name__}; wanted a torch.Generator")
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps!r} is not allowed; wanted an int >= 1")
        arguments = _accepted(pipe, pipeline_arguments) | _conditions(pipe, pixels, inside, references)
        masks = Masks.from_pixels(inside, pipe, reference_frames=len(references), dilate_tokens=config.dilate_tokens)
        _, height, width = inside.shape
        source = encode_source(pipe, pixels)
        if references:
            source = torch.cat([*_reference_latents(pipe, references, height, width), source], dim=2)
        arguments |= {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "output_type": "pt",
        }
        embeds = None
        if config.locks:
            if not source_prompt:
                notice_empty_prompt(stacklevel=3)
            embeds = pipe.encode_prompt(
                source_prompt, do_classifier_free_guidance=False, **_sequence_length(pipe, pipeline_arguments)
            )[0]

        attached = dataclasses.replace(config, composite="none" if config.composite == "pixel" else config.composite)
        lock = attach(
            pipe, source, masks, config=attached, source_prompt_embeds=embeds, kernel=self.kernel, store=self.store
        )
        with lock as session:
            if progress is not None:
                arguments |= _reporting(progress, arguments.get("callback_on_step_end"), session.trace)
            result = pipe(**arguments).frames[0]
        session.trace.config = config
        edited = result.float().cpu().movedim(1, -1).clamp(0, 1)
        if config.composite == "pixel":
            edited = torch.where(inside[..., None], edited, pixels)
        return KVLockOutput(edited, session.trace, masks)


def encode_source(pipe: Any, video: Tensor) -> Tensor:
    """The latents that `kvlock.attach` takes for a source video: [1, C, T, h, w] fp32, normalised as the pipeline does.

    Args:
        video: [F, H, W, 3], uint8 or floating point in [0, 1]; F = 4n + 1.

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


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes, read off the class in the table: a subclass may only pass it on."""
    known = next(base for base in type(pipe).__mro__ if base.__name__ in PIPELINES)
    return inspect.signature(known.__call__).parameters


def _accepted(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    known = _parameters(pipe)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}")
    taken = sorted(set(arguments) & OWN_ARGUMENTS)
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be given: KVLockPipeline decides it")
    return dict(arguments)


def _reporting(report: Callable[[int, int, Trace], None], callback: Any, trace: Trace) -> dict[str, Any]:
    """The pipeline's arguments that call `report` after every step, and then the caller's own callback."""

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        report(step, pipe.num_timesteps, trace)
        return kwargs if callback is None else callback(pipe, step, timestep, kwargs)

    tensors = getattr(callback, "tensor_inputs", None)  # diffusers reads them off its own kind of callback
    named = {} if tensors is None else {"callback_on_step_end_tensor_inputs": tensors}
    return {"callback_on_step_end": on_step_end} | named


def _sequence_length(pipe: Any, arguments: dict[str, Any]) -> dict[str, int]:
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
