"""A scheduler's schedule as plain numbers: noising, the clean prediction and step lookup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Those of the clean prediction, fp32 tensors [K] on one device; entry k is a 0-dim tensor, read without a copy.

    ``x0 = x_scale * x - v_scale * model_output``, as in `Flow`.
    """

    x_scale: Tensor
    v_scale: Tensor


@dataclass(frozen=True)
class Flow:
    """The denoising schedule of one run; every tuple has K entries, one for each entry of ``scheduler.timesteps``.

    All kinds share two formulas, in fp32, with the coefficients of step k::

        noisy = a_k * z0 + b_k * eps                x0 = x_scale_k * x - v_scale_k * model_output

        kind             a           b            x_scale      v_scale      model output
        flow             1 - s       s            1            s            eps - z0
        flow_inverted    s           1 - s        1            s - 1        z0 - eps     s is the share of the signal
        v_prediction     sqrt(A)     sqrt(1-A)    sqrt(A)      sqrt(1-A)    a*eps - b*z0, A = cumulative alpha

    Attributes:
        kind: ``"flow"``, ``"flow_inverted"`` or ``"v_prediction"``.
        timesteps: what the pipeline hands to the model at each step.
        sigmas: noise share b / (a + b) of each step, falling towards 0; the scheduler's own sigma for ``"flow"``.
        a, b, x_scale, v_scale: the coefficients above.
        begin_index: the step the run begins with where it is known beforehand, else None (the scheduler looks it up).
    """

    kind: str
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    x_scale: tuple[float, ...]
    v_scale: tuple[float, ...]
    begin_index: int | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Flow:
        """Read the schedule of `scheduler` after its ``set_timesteps``; copies it to the host once.

        Args:
            scheduler: a diffusers scheduler of a class named in `SCHEDULERS`, or of a subclass.

        Raises:
            ValueError: the class, its prediction type or one of its options is not supported (the message says what
                is), ``set_timesteps`` has not been called, or its ``begin_index`` lies outside the table.
        """
        read = _reader(scheduler)
        if getattr(scheduler, "num_inference_steps", None) is None:
            raise ValueError(f"{type(scheduler).__name__} has no schedule yet; call its set_timesteps first")
        flow = read(scheduler)
        start = getattr(scheduler, "begin_index", None)
        return flow if start is None else flow.starting_at(start)

    @property
    def start(self) -> int:
        """Index of the first step of the run (0 where the run has not said otherwise)."""
        return self.begin_index or 0

    def starting_at(self, step: int) -> Flow:
        """The same schedule for a run that begins at `step` of the full table, as video-to-video runs do.

        Raises:
            ValueError: `step` lies outside the table.
        """
        self._check_step(step)
        return replace(self, begin_index=step)

    def step_of(self, timestep: float | Tensor) -> int:
        """Index of the first step of a run, found by the value of its timestep; afterwards count steps instead.

        The rule is the scheduler's own: where a large shift rounds several entries to one value, a run that begins at a
        known index begins there, any other at the second of them. Synchronises if `timestep` is a device tensor.

        Args:
            timestep: a number, or a tensor of any shape whose elements are all equal.

        Raises:
            ValueError: the value is not in the table, or the tensor is empty or holds different values.
        """
        value = _single_value(timestep)
        found = [step for step, known in enumerate(self.timesteps) if known == value]
        if not found:
            nearest = min(self.timesteps, key=lambda known: abs(known - value))
            raise ValueError(
                f"timestep {value!r} is not one of the scheduler's {len(self.timesteps)} timesteps; "
                f"the nearest is {nearest!r}"
            )
        if self.begin_index in found:
            return self.start
        return found[1] if len(found) > 1 else found[0]

    def noise(self, z0: Tensor, eps: Tensor, step: int) -> Tensor:
        """Noise the clean latent to the level of `step`: ``a * z0 + b * eps`` in fp32, shapes broadcast.

        Raises:
            ValueError: `step` lies outside the table.
        """
        self._check_step(step)
        return self.a[step] * z0.float() + self.b[step] * eps.float()

    def x0(self, x: Tensor, model_output: Tensor, step: int) -> Tensor:
        """Clean prediction from the sample `x` of `step`: ``x_scale * x - v_scale * model_output`` in fp32.

        Raises:
            ValueError: `step` lies outside the table.
        """
        self._check_step(step)
        return self.x_scale[step] * x.float() - self.v_scale[step] * model_output.float()

    def eps_from(self, x: Tensor, z0: Tensor, step: int) -> Tensor:
        """The noise that turns `z0` into the sample `x` of `step`: ``(x - a * z0) / b`` in fp32; undoes `noise`.

        Raises:
            ValueError: `step` lies outside the table, or holds no noise.
        """
        self._check_step(step)
        if self.b[step] == 0:
            raise ValueError(f"step {step} holds no noise (sigma 0); wanted a step whose sigma is above 0")
        return (x.float() - self.a[step] * z0.float()) / self.b[step]

    def coefficients(self, device: torch.device | str = "cpu") -> Coefficients:
        """Those of every step's clean prediction on `device`; make them once per run."""
        rows = (self.x_scale, self.v_scale)
        return Coefficients(*torch.tensor(rows, dtype=torch.float32).to(device).unbind(0))

    def _check_step(self, step: int) -> None:
        if not 0 <= step < len(self.timesteps):
            raise ValueError(f"step {step} lies outside the scheduler's {len(self.timesteps)} timesteps")


def entry_of(timestep: Tensor, table: Tensor) -> int | None:
    """Which entry of `table` [K] a `timestep` is a view of, which is known without a look at its values; or None.

    Args:
        timestep: of any shape; an expanded entry is one.
    """
    same = timestep.dtype == table.dtype and timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    moves = any(size > 1 and stride != 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
    if not same or moves or table.stride(0) == 0:
        return None
    entry, rest = divmod(int(timestep.storage_offset() - table.storage_offset()), table.stride(0))
    return entry if rest == 0 and 0 <= entry < len(table) else None


def _single_value(timestep: float | Tensor) -> float:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.detach().reshape(-1).tolist())
    if len(values) != 1:
        found = "no value" if not values else f"{len(values)} different values"
        raise ValueError(f"timestep holds {found}; wanted one value for the whole batch")
    return float(values.pop())


def _host(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values.detach().cpu().tolist())


def _table(scheduler: Any, kind: str, a: Tensor, b: Tensor, x_scale: Tensor, v_scale: Tensor, sigmas: Tensor) -> Flow:
    return Flow(
        kind=kind,
        timesteps=_host(scheduler.timesteps),
        sigmas=_host(sigmas),
        a=_host(a),
        b=_host(b),
        x_scale=_host(x_scale),
        v_scale=_host(v_scale),
    )


def _sigmas_of_steps(scheduler: Any) -> Tensor:
    # One more sigma follows, the one reached after the last step. t / 1000 is no substitute: UniPC rounds t to an int.
    return scheduler.sigmas[: len(scheduler.timesteps)].detach().cpu()


def _flow_table(scheduler: Any) -> Flow:
    sigma = _sigmas_of_steps(scheduler)
    ones = torch.ones_like(sigma)
    return _table(scheduler, "flow", a=1.0 - sigma, b=sigma, x_scale=ones, v_scale=sigma, sigmas=sigma)


def _read_flow_match(scheduler: Any) -> Flow:
    if not scheduler.config.invert_sigmas:
        return _flow_table(scheduler)
    signal = _sigmas_of_steps(scheduler)
    noise, ones = 1.0 - signal, torch.ones_like(signal)
    return _table(scheduler, "flow_inverted", a=signal, b=noise, x_scale=ones, v_scale=-noise, sigmas=noise)


def _read_multistep_flow(scheduler: Any) -> Flow:
    _require(scheduler, "use_flow_sigmas", True)
    _require(scheduler, "prediction_type", "flow_prediction")
    _require(scheduler, "thresholding", False)
    return _flow_table(scheduler)


def _read_dpm_solver(scheduler: Any) -> Flow:
    if scheduler.config.prediction_type != "v_prediction":
        return _read_multistep_flow(scheduler)
    _require(scheduler, "use_flow_sigmas", False)
    _require(scheduler, "thresholding", False)
    ratio = _sigmas_of_steps(scheduler)  # noise over signal
    a = (1.0 + ratio**2) ** -0.5
    return _table(scheduler, "v_prediction", a=a, b=ratio * a, x_scale=a, v_scale=ratio * a, sigmas=ratio / (1 + ratio))


def _read_v_prediction(scheduler: Any) -> Flow:
    _require(scheduler, "prediction_type", "v_prediction")
    alphas_cumprod = scheduler.alphas_cumprod.detach().cpu()[scheduler.timesteps.detach().cpu().long()]
    a, b = alphas_cumprod**0.5, (1.0 - alphas_cumprod) ** 0.5
    return _table(scheduler, "v_prediction", a=a, b=b, x_scale=a, v_scale=b, sigmas=b / (a + b))


def _read_ddim(scheduler: Any) -> Flow:
    # Either option makes the scheduler's clean prediction a clipped one, which no linear formula reproduces.
    _require(scheduler, "clip_sample", False)
    _require(scheduler, "thresholding", False)
    return _read_v_prediction(scheduler)


SCHEDULERS: dict[str, Callable[[Any], Flow]] = {
    "FlowMatchEulerDiscreteScheduler": _read_flow_match,
    "UniPCMultistepScheduler": _read_multistep_flow,
    "DPMSolverMultistepScheduler": _read_dpm_solver,
    "DDIMScheduler": _read_ddim,
    "CogVideoXDDIMScheduler": _read_v_prediction,
    "CogVideoXDPMScheduler": _read_v_prediction,
}
"""Supported scheduler classes by name: subclasses are found through their bases."""


def _reader(scheduler: Any) -> Callable[[Any], Flow]:
    for base in type(scheduler).__mro__:
        if base.__name__ in SCHEDULERS:
            return SCHEDULERS[base.__name__]
    raise ValueError(f"unknown scheduler {type(scheduler).__name__}; supported schedulers: {', '.join(SCHEDULERS)}")


def _require(scheduler: Any, option: str, wanted: object) -> None:
    found = getattr(scheduler.config, option, None)
    if found != wanted:
        raise ValueError(
            f"{type(scheduler).__name__} with {option}={found!r} is not supported; wanted {option}={wanted!r}"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose class is not in `SCHEDULERS`; its options are checked once it has a schedule.

    Raises:
        ValueError: names the class and the supported ones.
    """
    _reader(scheduler)
