"""From a video, a mask and a prompt to an edited video: a thin layer over an unmodified diffusers pipeline."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock.adapters.attach import attach, check_recording, check_store, fitting
from kvlock.adapters.families import check_pipeline
from kvlock.adapters.kernels import check_kernel
from kvlock.adapters.prompts import encode_prompt, notice_empty_prompt
from kvlock.adapters.record import check_recordable, record
from kvlock.adapters.vae import repair_stride
from kvlock.config import KVLockConfig
from kvlock.job import Job, prepare, sequence_length
from kvlock.manifest import hash_of, short
from kvlock.masks import Masks
from kvlock.recorder import check_path
from kvlock.recording import Recording
from kvlock.store import Store
from kvlock.trace import Trace


class KVLockOutput(NamedTuple):
    """An edited video and how it came about."""

    frames: Tensor  # [F, H, W, 3] fp32 in [0, 1], on the CPU
    trace: Trace
    masks: Masks


class KVLockPipeline:
    """Edit videos with `pipe`, one of diffusers' pipelines that `attach` supports, under one set of settings.

    `kernel` and `store` are `attach`'s: where the lock acts, and how source rows are stored.
    """

    def __init__(
        self, pipe: Any, config: KVLockConfig | None = None, *, kernel: str = "hooks", store: Store | None = None
    ) -> None:
        check_kernel(kernel)
        self.pipe = pipe
        self.kernel = kernel
        self.store = fitting(store, kernel)
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
        recording: Recording | None = None,
        **pipeline_arguments: Any,
    ) -> KVLockOutput:
        """Change what the mask marks, as the prompt says, and leave the rest alone.

        Args:
            video: [F, H, W, 3], uint8 or floating point in [0, 1]; F = s * n + 1 with the VAE's stride s in time (4 for
                Wan, 8 for LTX), H and W multiples of a token's side.
            mask: [F, H, W], bool, uint8 in 0..255 or floating point in 0..1; above one half = edit.
            prompt: what the edited video shows.
            source_prompt: what the source shows; "" works and is noticed, a description locks better.
            negative_prompt: what to steer away from; None is the pipeline's own default.
            reference_images: PIL images for VACE; what is transparent in them goes on white.
            num_inference_steps: denoising steps, >= 1.
            guidance_scale: the pipeline's; above 1 it runs an unconditional branch, and the config's own
                `guidance_scale`, where set, then takes its place.
            generator: of the initial noise; None draws from torch's own.
            composite: overrides the config's: "none", "latent" or "pixel" (the source's own pixels outside the mask).
            trim: drop trailing frames down to s * n + 1 instead of refusing the video.
            progress: called after every step with (step, steps, trace).
            recording: the source's rows, from `record` with the same video, mask, references and steps; the source then
                does not run, and `source_prompt` is the recording's.
            pipeline_arguments: anything else the pipeline's call takes.

        Raises:
            ValueError: video, mask, prompt or a setting cannot be used; the message says why.
        """
        config = self.config if composite is None else dataclasses.replace(self.config, composite=composite)
        check_recording(recording, config, self.store)
        given = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "generator": generator,
            "output_type": "pt",
        }
        job = prepare(
            self.pipe,
            video,
            mask,
            given,
            pipeline_arguments,
            source_prompt=source_prompt,
            reference_images=reference_images,
            trim=trim,
            dilate_tokens=config.dilate_tokens,
        )
        if recording is not None and config.locks:
            agree_on_inputs(recording, source_prompt, job)
        embeds = self._source_prompt(source_prompt, pipeline_arguments) if config.locks and recording is None else None

        attached = dataclasses.replace(config, composite="none" if config.composite == "pixel" else config.composite)
        with attach(
            self.pipe,
            job.source,
            job.masks,
            config=attached,
            source_prompt_embeds=embeds,
            kernel=self.kernel,
            store=self.store,
            recording=recording,
        ) as session:
            result = self.pipe(**_reporting(job.arguments, progress, session.trace)).frames[0]
        session.trace.config = config
        edited = result.float().cpu().movedim(1, -1).clamp(0, 1)
        if config.composite == "pixel":
            edited = torch.where(job.inside[..., None], edited, job.pixels)
            session.trace.composite = "pixel"
        if session.trace.composite != config.composite:
            stopped = f"the run was stopped after {len(session.trace)} steps, before its last one"
            warnings.warn(f'composite="{config.composite}" was not applied: {stopped}', stacklevel=3)
        return KVLockOutput(edited, session.trace, job.masks)

    @torch.no_grad()
    def record(
        self,
        path: str | Path,
        video: Tensor,
        mask: Tensor,
        *,
        source_prompt: str = "",
        reference_images: Sequence[Any] | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        trim: bool = False,
        progress: Callable[[int, int, Trace], None] | None = None,
        about: Mapping[str, Any] | None = None,
        **pipeline_arguments: Any,
    ) -> Recording:
        """Record the source's rows, from which any number of edits take them.

        Args:
            path: a folder that is not there yet. It will hold the video, the mask and the references too.
            about: what readers of the recording find again, as JSON types.

        Of the other arguments, those that an edit has as well must be the same there.

        Returns:
            The recording, whose ``inputs`` are "frames" [F, H, W, 3] as given, "mask" [F, H, W] bool, and a
            "reference_0" [h, w, 3] uint8 and so on; its path is absolute.

        Raises:
            ValueError: as an edit, or as `kvlock.record`.
        """
        check_recordable(self.config, self.store)
        path = Path(path)
        check_path(path)
        target = path.absolute()  # the current folder may be another one when the recording is whole
        given = {
            "prompt": source_prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": 5.0,  # above 1, so that both branches are asked for
            "generator": generator,
            "output_type": "latent",
        }
        job = prepare(
            self.pipe,
            video,
            mask,
            given,
            pipeline_arguments,
            source_prompt=source_prompt,
            reference_images=reference_images,
            trim=trim,
            dilate_tokens=self.config.dilate_tokens,
        )
        embeds = self._source_prompt(source_prompt, pipeline_arguments)
        inputs = {"frames": video[: len(job.inside)], "mask": job.inside}
        inputs |= {f"reference_{i}": pixels for i, pixels in enumerate(job.references)}
        seed = generator.initial_seed() if isinstance(generator, torch.Generator) else None
        own = {"source_prompt": source_prompt, "seed": seed, "kernel": self.kernel, **hashes(job)}

        config = dataclasses.replace(self.config, composite="none")
        with record(
            self.pipe,
            path,
            job.source,
            job.masks,
            config=config,
            source_prompt_embeds=embeds,
            kernel=self.kernel,
            store=self.store,
        ) as session:
            session.keep_inputs(inputs, dict(about or {}) | own)
            self.pipe(**_reporting(job.arguments, progress, session.trace))
        return Recording(target)

    def _source_prompt(self, text: str, pipeline_arguments: dict[str, Any]) -> Tensor:
        """Its embeddings, as long as the pipeline makes those of the prompt."""
        if not text:
            notice_empty_prompt(stacklevel=4)
        length = sequence_length(self.pipe, pipeline_arguments)
        return encode_prompt(self.pipe, text, **length)


def hashes(job: Job) -> dict[str, Any]:
    """Of video, mask and references, before anything rounds them."""
    references = [hash_of(pixels) for pixels in job.references]
    return {"video": hash_of(job.pixels), "mask": hash_of(job.inside), "references": references}


def agree_on_inputs(recording: Recording, source_prompt: str, job: Job) -> None:
    """An edit's video, mask, references and, where it has one, source prompt are the recorded ones; or ValueError."""
    found = hashes(job) | ({"source_prompt": source_prompt} if source_prompt else {})
    for name, value in found.items():
        recorded = recording.about.get(name, value)  # a recording by `kvlock.record` knows latents only
        if recorded != value:
            raise ValueError(
                f"{recording.path} was recorded with {name} {short(recorded)}, this edit has {short(value)}; "
                "wanted them alike"
            )


def _reporting(
    arguments: dict[str, Any], report: Callable[[int, int, Trace], None] | None, trace: Trace
) -> dict[str, Any]:
    """The arguments of a call that calls `report` after every step, and then the caller's own callback."""
    if report is None:
        return arguments
    callback = arguments.get("callback_on_step_end")

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        report(step, pipe.num_timesteps, trace)
        return kwargs if callback is None else callback(pipe, step, timestep, kwargs)

    tensors = getattr(callback, "tensor_inputs", None)  # diffusers reads them off its own kind of callback
    named = {} if tensors is None else {"callback_on_step_end_tensor_inputs": tensors}
    return arguments | {"callback_on_step_end": on_step_end} | named
