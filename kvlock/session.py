"""One edit's state: it decides what each call of the transformer needs and what each step of the scheduler gets."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvlock.config import KVLockConfig
from kvlock.flow import Coefficients, Flow, entry_of
from kvlock.locked_layers import LockedLayers
from kvlock.recorder import Recorder
from kvlock.recording import Recording
from kvlock.run import Run
from kvlock.source import Source
from kvlock.trace import StepRecord, Trace


class Session:
    """The state behind `kvlock.attach`, driven by its hooks in this order, K times a run::

        set_schedule                                    once, when the pipeline sets its timesteps
        begin_call [source_pass] end_call               conditional branch
        begin_call               end_call               unconditional branch, if there is one, and not in the first call
        guide, finish_step                              around scheduler.step

    Nothing in this loop reads a device tensor on the host or copies one to the device, with three exceptions: source
    rows kept on the host or the disk; once a run, with a recording, some values of the weights, the conditions and the
    initial noise; and the first timestep of a pipeline that does not hand over the scheduler's own.

    Attributes:
        config: the settings.
        source: what is known of the source.
        trace: what the latest run did.
        in_source_pass: whether the transformer is running on the source right now.
    """

    def __init__(
        self,
        config: KVLockConfig,
        source: Source,
        *,
        rows: LockedLayers,
        begin_run: Callable[[], None],
        check_model: Callable[[], None],
        guidance_of: Callable[[int], float],
        begin_index_of: Callable[[], int | None],
        starts_from_video: bool,
        guidance_follows: bool,
        ledger: Recorder | Recording | None = None,
    ) -> None:
        self.config = config
        self.trace = Trace(config)
        self.in_source_pass = False
        self.source = source
        self._rows = rows
        self._begin_run = begin_run  # refuses other transformers than those of attach
        self._check_model = check_model  # against the layers of attach and what source rows belong to
        self._guidance_of = guidance_of
        self._begin_index_of = begin_index_of
        self._starts_from_video = starts_from_video
        self._guidance_follows = guidance_follows  # whether the pipeline heeds a scale that changes inside a run
        self._ledger = ledger  # what belongs to the source rows: written while they are recorded, compared afterwards
        self._flow: Flow | None = None
        self._timesteps = torch.empty(0)  # those of `_flow`, as the scheduler has them
        self._coefficients: Coefficients | None = None
        self._run: Run | None = None

    def __deepcopy__(self, memo: dict) -> Session:
        return self  # a copy of the scheduler goes on driving this edit

    def set_schedule(self, flow: Flow, timesteps: Tensor) -> None:
        """A new run begins with this schedule; its timesteps [K] are, in all known pipelines, on the device of the run.

        What the run needs goes there now, because copies to a device make the host wait for it. Where the run's latents
        turn out to be elsewhere, it follows them at the first call.

        Raises:
            ValueError: a transformer has been replaced. Asked here, because a compiled one would trace the first call.
        """
        self._begin_run()
        self._flow, self._timesteps, self._run = flow, timesteps, None
        self._coefficients = flow.coefficients(timesteps.device)
        self.source.move(timesteps.device)
        self._rows.to(timesteps.device)
        self.trace.clear()
        self.release()

    def begin_call(
        self,
        expert: int,
        x: Tensor,
        timestep: Tensor,
        conditions: Mapping[str, Any] | None = None,
        *,
        branches: int = 1,
    ) -> Tensor | None:
        """The transformer is about to run on latents `x` [B, ...]; the source gets the same `conditions`, by name.

        Args:
            branches: 2 where it runs on both guidance branches of them at once, the unconditional one first.

        Returns:
            The noised source [B, ...] fp32 that must run before this call (`source="store"`) or beside it
            (`source="batch"`), or None where this call needs no source.
        """
        if self._run is None:
            self._run = self._new_run(expert, x, timestep)
            self._agree_on_run(self._run, x, conditions or {})
        run = self._run
        if run.use_expert(expert, self._guidance_of):
            self._rows.free()
        elif self._guidance_follows:
            run.set_guidance(self._guidance_of(expert))
        run.begin_call(len(x), branches)
        if not run.mixes:
            self._rows.off()
            return None
        run.mixed = run.ever_mixed = True
        if self.config.source == "batch":
            source = run.noised_source(x)
            run.forwards += len(source)
            run.extra_rows = len(source)
            self._rows.lerp_batch(run.call_ratio, len(source))
            return source
        if isinstance(self._ledger, Recording) and run.recorded_step != run.step:
            run.noise_from(x)  # as a source that runs would
            self._rows.turn_to(run.step)
            run.recorded_step = run.step
        if run.recorded_step == run.step:
            self._rows.lerp(run.call_ratio)
            return None
        source = run.noised_source(x)
        run.forwards += len(source)
        return source

    @contextlib.contextmanager
    def source_pass(self) -> Iterator[None]:
        """Around the forward on the source: its K and V are recorded, then the taps are ready to lerp."""
        run = self._require_run()
        self.in_source_pass = True
        self._rows.turn_to(run.step)
        self._rows.record()
        try:
            yield
            self._rows.require_all(run.expert)
            self._rows.seal()
        finally:
            self.in_source_pass = False
            self._rows.off()
        run.recorded_step = run.step
        self._rows.lerp(run.call_ratio)

    def end_call(self, output: Tensor) -> Tensor:
        """The transformer has run; returns the edit's part of its prediction."""
        run = self._require_run()
        if run.mixes:
            self._rows.require_all(run.expert)
        return run.end_call(output)

    def guide(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The velocity the scheduler gets in place of the pipeline's `model_output`, both [B, ...].

        Where the settings do not touch guidance it is that very tensor.
        """
        run = self._require_run()
        run.outputs = [output.to(model_output.dtype) for output in run.outputs]  # some pipelines guide in fp32
        guided = run.guided_velocity(sample)
        if self._ledger is not None and run.step == run.flow.start:
            # A source that runs in the first step has its noise from what the transformer is given, perhaps rounded.
            self._ledger.agree(noise_dtype=str(run.noise_dtype))
            self._ledger.agree_on_noise(run.initial_noise)
        variances = run.observe(guided)
        guides = len(run.outputs) > 1
        self.trace.append(
            StepRecord(
                step=run.step - run.flow.start,
                timestep=run.flow.timesteps[run.step],
                sigma=run.flow.sigmas[run.step],
                expert=run.expert,
                in_window=run.in_window,
                locked=run.mixed,
                forwards=run.forwards,
                source_bytes=self._rows.source_bytes if run.recorded_step == run.step else 0,
                fusion_ratio=run.fusion_ratio.clone() if run.mixed else torch.zeros_like(run.fusion_ratio),
                guidance_scale=run.guidance_scale.clone() if guides else torch.ones_like(run.guidance_scale),
                s_star=guided.s_star,
                **variances,
            )
        )
        return model_output if run.keeps_pipeline_velocity else guided.velocity

    def finish_step(self, latents: Tensor) -> Tensor:
        """The latents [B, ...] the scheduler arrived at; returns those the pipeline goes on with."""
        run = self._require_run()
        run.advance()
        if not run.finished:
            return latents
        if self.config.locks and not run.ever_mixed:
            warnings.warn(f"nothing was locked: {self._why_not(run)}", stacklevel=2)
        self.release()
        self._flow = self._run = None  # the next run sets its own timesteps, or its scheduler is not the one attached
        if self.config.composite != "latent":
            return latents
        self.trace.composite = "latent"
        return run.composite(latents)

    def use_rows(self, rows: LockedLayers) -> None:
        """From the next call of the transformer on these rows are recorded and lerped, and the source runs for them."""
        self.release()
        self._rows = rows
        if self._run is not None:
            self._run.recorded_step = -1

    def release(self) -> None:
        """Put the taps to rest and free the recorded rows."""
        self._rows.off()
        self._rows.free()

    def close(self) -> None:
        """Free everything but the trace."""
        self.release()
        self._flow = self._run = None

    def _new_run(self, expert: int, x: Tensor, timestep: Tensor) -> Run:
        if self._flow is None:
            raise ValueError("the scheduler has set no timesteps since attach; was pipe.scheduler replaced?")
        flow = self._flow
        self._check_model()
        if x.device != self._timesteps.device:
            self.source.move(x.device)
            self._rows.to(x.device)
            self._coefficients = flow.coefficients(x.device)
        assert self._coefficients is not None
        # Read now: pipelines that set a begin index do so after they have set the timesteps.
        start = self._begin_index_of()
        if start is None:
            at = entry_of(timestep, self._timesteps)
            start = flow.step_of(timestep if at is None else flow.timesteps[at])
        flow = flow.starting_at(start)
        run = Run(
            self.config,
            flow,
            self._coefficients,
            self.source.masks,
            self.source.latents,
            x,
            expert=expert,
            guidance=self._guidance_of(expert),
            starts_from_video=self._starts_from_video,
        )
        config = self.config
        pipeline_guidance = self._guidance_of(0)  # by this one alone a pipeline decides whether there are two branches
        if not math.isfinite(pipeline_guidance):
            raise ValueError(f"guidance_scale={pipeline_guidance} is not allowed; wanted a finite number")
        if pipeline_guidance <= 1 and config.guides:
            warnings.warn(
                f"guidance_scale={pipeline_guidance:g} means no unconditional branch: s*, the guidance schedule, "
                "guidance_scale and background_guidance of the config have no effect in this run",
                stacklevel=2,
            )
        return run

    def _agree_on_run(self, run: Run, x: Tensor, conditions: Mapping[str, Any]) -> None:
        """What the source rows of this run depend on, beside model, masks and source."""
        if self._ledger is None:
            return
        self._ledger.agree(steps=len(run.flow.timesteps), first_step=run.flow.start, sigmas=list(run.flow.sigmas))
        self._ledger.agree_on_part(locked_steps=list(run.window))
        if isinstance(self._ledger, Recording) and self.config.fusion != "variance":
            self._ledger.agree_on_part(recorded_steps=list(run.window))  # a variance skips some that have no ratio yet
        self._ledger.agree(batch=len(x), conditions=sorted(conditions), autocast=_autocast(x.device))
        for name, value in conditions.items():
            if isinstance(value, Tensor):
                self._ledger.agree_on_tensor(name, value)
            else:
                self._ledger.agree(**{name: value if isinstance(value, int) else repr(value)})

    def _why_not(self, run: Run) -> str:
        """Why the lock never acted in a run that has ended."""
        if not run.window:
            return "no step of this run lies in the window; wanted more steps, or a larger kappa"
        if self.config.branches == "uncond":
            return 'branches="uncond", and this run has no unconditional branch'
        return "no step of the window had two predictions of its transformer before it; wanted more steps"

    def _require_run(self) -> Run:
        if self._run is None:
            raise ValueError("scheduler.step was called before the transformer ran; wanted a whole pipeline call")
        return self._run


def _autocast(device: torch.device) -> str | None:
    """The dtype that torch's autocast computes in there, as a text; None where it is off."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None
