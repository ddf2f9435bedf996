"""One denoising run: the tensors that steer it, from the clean predictions to the next step's lock and guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvlock.config import MIN_HISTORY, KVLockConfig
from kvlock.flow import Coefficients, Flow
from kvlock.masks import Masks
from kvlock_kernels import LockSchedule, guided_velocity, lock_schedule, windowed_variance_


class Guided(NamedTuple):
    """A step's guided prediction."""

    velocity: Tensor  # [B, ...] in the model's dtype
    s_star: Tensor  # [B] fp32
    x0: Tensor  # [B, ...] fp32
    x0_cond: Tensor  # [B, ...] fp32, of the conditional branch


class Run:
    """The state of one run, made from the latents `x` [B, C, T, h, w] of its first call of the transformer.

    All tensors are on the device of `x`. Steps count through the scheduler's full table, from `flow.start` to its end.

    Raises:
        ValueError: source latents or masks do not fit `x`.
    """

    def __init__(
        self,
        config: KVLockConfig,
        flow: Flow,
        coefficients: Coefficients,
        masks: Masks,
        source_latents: Tensor,
        x: Tensor,
        *,
        expert: int,
        guidance: float,
        starts_from_video: bool,
    ) -> None:
        _check_fit(masks, source_latents, x)
        device, batch, steps = x.device, len(x), len(flow.timesteps)
        self.config = config
        self.flow = flow
        self.step = flow.start
        self.expert = expert
        self.forwards = 0
        self.extra_rows = 0  # of the source, in front of the edit's in the call under way
        self.branches: tuple[str, ...] = ()  # of the call under way, in the order of its samples
        self.outputs: list[Tensor] = []  # of this step: conditional, then unconditional
        self.recorded_step = -1
        self.mixes = False  # whether the lock acts on the call under way
        self.mixed = False  # whether the lock acted on a branch of this step
        self.ever_mixed = False
        self.window = config.locked_steps(steps, flow.sigmas, start=flow.start)  # where lock and boost act
        self._masks = masks
        self._source = source_latents
        self._starts_from_video = starts_from_video
        self._eps: Tensor | None = None
        self.noise_dtype: torch.dtype | None = None  # of what the initial noise was taken from
        self._coefficients = coefficients
        self._guidance = _base(config, guidance)
        self._base_guidance = torch.full((batch,), self._guidance, device=device)
        self._boosted = self._base_guidance.clone()
        self._predictions = 0  # clean predictions since the variance's window was reset
        self._seen = torch.zeros(1, dtype=torch.int64, device=device)  # the same, where the kernels read it
        ring = (config.window_steps(steps), *x.shape)
        self._planned: LockSchedule  # for the next step
        self._guided_history = torch.empty(ring, device=device)
        self._cond_history = torch.empty(ring, device=device)
        fixed = float(config.fusion == "full") if isinstance(config.fusion, str) else float(config.fusion)
        self.fusion_ratio = torch.full((batch,), fixed, device=device)

    @property
    def in_window(self) -> bool:
        """Whether this step is inside the window in which the lock and a boosted guidance act."""
        return self.step in self.window

    @property
    def has_ratio(self) -> bool:
        """Whether the fusion ratio is defined yet: a variance needs two predictions, also after a change of expert."""
        return self.config.fusion != "variance" or self._predictions >= MIN_HISTORY

    @property
    def initial_noise(self) -> Tensor:
        """eps [B, C, T, h, w] fp32, known from the first step on."""
        assert self._eps is not None
        return self._eps

    @property
    def finished(self) -> bool:
        return self.step >= len(self.flow.timesteps)

    @property
    def guidance_scale(self) -> Tensor:
        """omega of this step inside the mask, [B] fp32."""
        return self._boosted if self.in_window and self.config.dynamic_guidance else self._base_guidance

    @property
    def keeps_pipeline_velocity(self) -> bool:
        """Whether the pipeline's own combination of the branches stands at this step."""
        config = self.config
        changed = config.optimized_scale or config.background_guidance is not None or config.guidance_scale is not None
        changed = changed or (config.dynamic_guidance and self.in_window)
        return not self._zeroed and (not changed or len(self.outputs) < 2)

    @property
    def _zeroed(self) -> bool:
        return self.step - self.flow.start < self.config.zero_init_steps

    @property
    def call_ratio(self) -> Tensor:
        """The fusion ratio of every sample of the call under way, [B] a branch: 0 in one that is not locked."""
        ratio = self.fusion_ratio
        if len(self.branches) == 1:
            return ratio
        return torch.cat([ratio if self._locks(branch) else torch.zeros_like(ratio) for branch in self.branches])

    def _locks(self, branch: str) -> bool:
        return self.config.locks and self.config.branches in ("both", branch)

    def begin_call(self, samples: int, branches: int) -> None:
        """The transformer is about to run on one or both guidance branches of so many samples.

        Raises:
            ValueError: the step has had two branches; or there are several samples of both, which have no one source.
        """
        if len(self.outputs) + branches > 2:
            raise ValueError("the transformer ran more than twice in one step; wanted one or two guidance branches")
        if branches == 2 and samples > 1 and self.config.locks:
            raise ValueError(
                f"{samples} videos in a call of the transformer that has both guidance branches; wanted one video"
            )
        self.branches = ("uncond", "cond") if branches == 2 else (("cond", "uncond")[len(self.outputs)],)
        self.mixes = self.in_window and self.has_ratio and any(map(self._locks, self.branches))
        self.forwards += branches * samples
        self.extra_rows = 0

    def end_call(self, output: Tensor) -> Tensor:
        """Take the transformer's prediction; returns the edit's part of it, its branches in the order of the call."""
        output = output[self.extra_rows :]
        found = dict(zip(self.branches, output.chunk(len(self.branches)), strict=True))
        self.outputs += [found[branch] for branch in ("cond", "uncond") if branch in found]
        return output

    def use_expert(self, expert: int, guidance_of: Callable[[int], float]) -> bool:
        """Another transformer takes over: its predictions start a new window, with its own guidance scale.

        Returns:
            Whether it is another one than before.
        """
        if expert == self.expert:
            return False
        self.expert = expert
        self._predictions = 0
        self._seen.zero_()
        self.set_guidance(guidance_of(expert))
        self._boosted.copy_(self._base_guidance)
        return True

    def set_guidance(self, scale: float) -> None:
        """The pipeline's guidance scale from now on; this step's boost was planned, and applies to it."""
        before, self._guidance = self._guidance, _base(self.config, scale)
        if self._guidance == before:
            return
        self._base_guidance.fill_(self._guidance)
        if before == 0:
            self._boosted.copy_(self._base_guidance)
        else:
            self._boosted.mul_(self._guidance / before)

    def noised_source(self, x: Tensor) -> Tensor:
        """The source at this step's noise level, with each sample's own initial noise: [B, C, T, h, w] fp32."""
        return self.flow.noise(self._source, self.noise_from(x), self.step)

    def noise_from(self, x: Tensor) -> Tensor:
        """The initial noise of each sample, which the source shares: from the first x [B, C, T, h, w] that asks."""
        if self._eps is None:
            self._eps = self.flow.eps_from(x, self._source, self.step) if self._starts_from_video else x.float()
            self.noise_dtype = x.dtype
        return self._eps

    def guided_velocity(self, sample: Tensor) -> Guided:
        """Combine this step's branches (eqs. 10 and 13); zero-init replaces the velocity, not the clean prediction."""
        if self.step == self.flow.start:
            self.noise_from(sample)  # in the scheduler's precision; the model's input may be coarser
        cond, uncond = self.outputs[0], self.outputs[1] if len(self.outputs) > 1 else None
        k, c = self.step, self._coefficients
        background = self.config.background_guidance if uncond is not None else None
        out = guided_velocity(
            cond,
            uncond,
            self.guidance_scale,
            sample,
            c.v_scale[k],
            mask=self._masks.latent if background is not None else None,
            background_guidance=background,
            optimized_scale=self.config.optimized_scale,
            x_scale=c.x_scale[k],
        )
        x0_cond = out.x0 if uncond is None else self.flow.x0(sample, cond, k)
        velocity = torch.zeros_like(out.velocity) if self._zeroed else out.velocity
        return Guided(velocity, out.s_star, out.x0, x0_cond)

    def observe(self, guided: Guided) -> dict[str, Tensor]:
        """Add this step's clean predictions to the window and steer the next step by their variance (eq. 14).

        Returns:
            The variances [B] after this step, by their names in `StepRecord`.
        """
        masked, everywhere = self._masks.weight, self._masks.global_weight
        chosen = "guided" if self.config.x0 == "guided" else "cond"
        rings = {"guided": (guided.x0, self._guided_history), "cond": (guided.x0_cond, self._cond_history)}
        inside = {name: windowed_variance_(*ring, self._seen, weight=masked) for name, ring in rings.items()}
        whole = windowed_variance_(*rings[chosen], self._seen, weight=everywhere)
        self._predictions += 1
        self._seen.add_(1)
        steering = inside[chosen] if self.config.variance == "masked" else whole
        self._planned = lock_schedule(
            steering,
            self._base_guidance,
            tau=self.config.tau,
            boost=self.config.boost,
            alpha_min=self.config.alpha_min,
        )
        return {
            "variance_masked": inside[chosen],
            "variance_global": whole,
            "variance_guided": inside["guided"],
            "variance_cond": inside["cond"],
        }

    def advance(self) -> None:
        """Go to the next step, with the lock and the guidance planned for it."""
        if self.config.fusion == "variance":
            self.fusion_ratio.copy_(self._planned.fusion_ratio)
        self._boosted.copy_(self._planned.guidance_scale)
        self.step += 1
        self.forwards = 0
        self.mixed = False
        self.outputs.clear()

    def composite(self, latents: Tensor) -> Tensor:
        """The edit inside the latent mask, the source outside it."""
        return torch.where(self._masks.latent > 0, latents, self._source.to(latents.dtype))


def _base(config: KVLockConfig, guidance: float) -> float:
    return float(guidance if config.guidance_scale is None else config.guidance_scale)


def _check_fit(masks: Masks, source_latents: Tensor, x: Tensor) -> None:
    batches = "1" if len(x) == 1 else f"1 or {len(x)}"
    if source_latents.shape[1:] != x.shape[1:] or len(source_latents) not in (1, len(x)):
        raise ValueError(
            f"source_latents has shape {list(source_latents.shape)}; wanted [{batches}, "
            f"{', '.join(map(str, x.shape[1:]))}] as the edit's latents have (its height, width and num_frames)"
        )
    if masks.latent.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"masks were made for latents of [T, h, w] = {list(masks.latent.shape[2:])}; "
            f"the edit's latents have {list(x.shape[2:])}"
        )
