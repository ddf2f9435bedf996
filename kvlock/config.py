"""The settings of one KV-Lock edit: a frozen dataclass that refuses nonsense, and the named presets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

DEFAULT_KAPPA = 0.4  # the last 20 of 50 steps, the paper's setting, as a share of the run
FP32_MAX = 3.4e38  # every number ends in an fp32 tensor
MIN_TAU = 1e-30  # far below any variance, and far enough from 0 in fp32 for var / tau to be a number
MIN_HISTORY = 2  # a sample variance needs two clean predictions; both come from earlier steps


@dataclass(frozen=True)
class KVLockConfig:
    """Every knob of the method, checked once when the object is made.

    Notation: sigma is the noise share of a step, var the windowed variance of the clean prediction x0, alpha the fusion
    ratio, omega the guidance scale, s* the optimised scale of the unconditional branch::

        alpha = clamp(var / tau, alpha_min, 1)          omega = guidance_scale * clamp(var / tau, 1, boost)

    Attributes:
        fusion: source of alpha: ``"variance"`` (the formula above), ``"full"`` (1), ``"off"`` (no lock, no source
            pass) or a fixed number in [0, 1].
        alpha_min: lower end of alpha in [0, 1]; only with ``fusion="variance"``.
        tau: variance, in units of the normalised latent, at which the lock is complete; >= 1e-30.
        boost: upper end of omega / guidance_scale; >= 1 (the paper's b).
        kappa: length of the window at the end of the run in which alpha and omega act: an int is a number of steps,
            a float in (0, 1] a share of the steps, rounded up. ``1`` is one step, ``1.0`` all of them.
        kappa_sigma: the same window as a noise level: act while sigma <= kappa_sigma, in (0, 1]. It takes the place of
            `kappa`, which becomes None; giving it together with a `kappa` other than the default is refused.
        window: number of predictions the variance looks back on, int >= 2 or a share like `kappa` (at least 2 steps).
        variance: average the variance over the ``"masked"`` latent elements, or over all of them (``"global"``).
        x0: take the clean prediction from the ``"guided"`` velocity or from the conditional branch (``"cond"``).
        optimized_scale: whether s* scales the unconditional branch (otherwise s* = 1).
        dynamic_guidance: whether omega follows the variance (otherwise omega = guidance_scale).
        guidance_scale: omega0; None takes the pipeline's own argument.
        background_guidance: guidance outside the mask on every step, never boosted; None guides both sides alike.
        zero_init_steps: number of first steps whose velocity is set to zero.
        layers: indices of the main blocks to lock; None locks all of them. A source that runs on its own
            (``source="store"``) ends with the last of them, and hooks on later blocks do not see it; where diffusers or
            accelerate offload weights, or spread them over devices, it runs every block.
        control_blocks: whether VACE's control blocks are locked too.
        branches: lock ``"both"`` guidance branches, or only ``"cond"`` or ``"uncond"``.
        source: ``"store"`` runs the source once per locked step and keeps K and V; ``"batch"`` runs it beside the edit.
        dilate_tokens: how many tokens the mask grows to every side before the rest is locked.
        composite: paste the source background back: ``"none"``, in ``"latent"`` space or in ``"pixel"`` space.

    Raises:
        ValueError: a setting is outside its range or contradicts another one; the message names it, the value found and
            the value wanted.
    """

    fusion: float | str = "variance"
    alpha_min: float = 0.0
    tau: float = 0.01
    boost: float = 2.0
    kappa: int | float | None = DEFAULT_KAPPA
    kappa_sigma: float | None = None
    window: int | float = 0.2
    variance: str = "masked"
    x0: str = "guided"
    optimized_scale: bool = True
    dynamic_guidance: bool = True
    guidance_scale: float | None = None
    background_guidance: float | None = None
    zero_init_steps: int = 0
    layers: tuple[int, ...] | None = None
    control_blocks: bool = False
    branches: str = "both"
    source: str = "store"
    dilate_tokens: int = 1
    composite: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.fusion, str):
            _check_choice("fusion", self.fusion, ("variance", "full", "off"), also="or a number in [0, 1]")
        else:
            _check_real("fusion", self.fusion, 0.0, 1.0)
        _check_real("alpha_min", self.alpha_min, 0.0, 1.0)
        if self.alpha_min != 0 and self.fusion != "variance":
            raise ValueError(
                f"alpha_min={self.alpha_min!r} has no effect with fusion={self.fusion!r}: "
                "it bounds the ratio of fusion='variance' only; leave it at 0"
            )
        self._refuse_what_a_lock_alone_has()
        _check_real("tau", self.tau, MIN_TAU, math.inf)
        _check_real("boost", self.boost, 1.0, math.inf)
        self._settle_kappa()
        _check_extent("window", self.window, smallest=MIN_HISTORY)
        _check_choice("variance", self.variance, ("masked", "global"))
        _check_choice("x0", self.x0, ("guided", "cond"))
        for name in ("optimized_scale", "dynamic_guidance", "control_blocks"):
            _check_bool(name, getattr(self, name))
        for name in ("guidance_scale", "background_guidance"):
            if getattr(self, name) is not None:
                _check_real(name, getattr(self, name), 0.0, math.inf)
        _check_count("zero_init_steps", self.zero_init_steps)
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        _check_choice("branches", self.branches, ("both", "cond", "uncond"))
        _check_choice("source", self.source, ("store", "batch"))
        _check_count("dilate_tokens", self.dilate_tokens)
        _check_choice("composite", self.composite, ("none", "latent", "pixel"))

    def _refuse_what_a_lock_alone_has(self) -> None:
        if self.fusion != "off":
            return
        for name in ("layers", "control_blocks", "branches"):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} has no effect with fusion='off', which locks nothing; leave it at {default!r}"
                )

    def _settle_kappa(self) -> None:
        if self.kappa_sigma is None:
            if self.kappa is None:
                raise ValueError("kappa=None leaves no window to act in; wanted kappa (steps or share) or kappa_sigma")
            _check_extent("kappa", self.kappa, smallest=1)
            return
        _check_real("kappa_sigma", self.kappa_sigma, 0.0, 1.0, open_low=True)
        # The default counts as not given, so that dataclasses.replace(config, kappa_sigma=...) works on every preset.
        if self.kappa is not None and (isinstance(self.kappa, bool) or self.kappa != DEFAULT_KAPPA):
            raise ValueError(
                f"kappa={self.kappa!r} and kappa_sigma={self.kappa_sigma!r} both define the window; give one of them"
            )
        object.__setattr__(self, "kappa", None)

    @property
    def locks(self) -> bool:
        """Whether source K and V are mixed in at all (a source pass is needed)."""
        return self.fusion != "off"

    @property
    def guides(self) -> bool:
        """Whether two guidance branches are, in some step, combined otherwise than the pipeline does."""
        given = self.guidance_scale is not None or self.background_guidance is not None
        return self.optimized_scale or self.dynamic_guidance or given

    @property
    def passthrough(self) -> bool:
        """Whether denoising is exactly the pipeline's own, only traced; says nothing of `composite`."""
        return not self.locks and not self.guides and self.zero_init_steps == 0

    def locked_steps(self, num_steps: int, sigmas: Sequence[float] | None = None, *, start: int = 0) -> range:
        """Steps of the window in which alpha and a boosted omega act, as indices into the scheduler's full table.

        In some of them a run may mix no row, as a trace tells: after a change of transformer, or with fusion "off".

        The window is counted from the end of the table, so that a video-to-video run that starts part-way (`start` > 0)
        is locked at the same noise levels as a full one. It always reaches the last step::

            num_steps=10               0 1 2 3 4 5 6 7 8 9
            kappa=0.4                  . . . . . . L L L L
            kappa=1.0                  . . L L L L L L L L     fusion="variance" or "off"
            kappa=1.0                  L L L L L L L L L L     fusion="full" or a number

        The variance that steers step k comes from steps before k and needs two of them, so the first two steps of the
        run never belong to the window unless the ratio is fixed. A run too short for that, or a `kappa_sigma` below its
        last sigma, gives an empty range.

        Args:
            num_steps: length of the scheduler's table, >= 1.
            sigmas: noise share of each step, [num_steps], decreasing; needed with `kappa_sigma` only.
            start: index at which the run begins.

        Raises:
            ValueError: `num_steps` or `start` is out of range, or `sigmas` is missing or of another length.
        """
        _check_count("num_steps", num_steps, smallest=1)
        _check_count("start", start)
        if start >= num_steps:
            raise ValueError(f"start={start} lies outside a table of {num_steps} steps")
        if sigmas is not None and len(sigmas) != num_steps:
            raise ValueError(f"sigmas has {len(sigmas)} entries; num_steps={num_steps} wants one for each step")
        if self.kappa is not None:
            first = num_steps - min(num_steps, _resolve_extent(self.kappa, num_steps))
        elif sigmas is None or self.kappa_sigma is None:
            raise ValueError("kappa_sigma needs the sigmas of the run; pass sigmas")
        else:
            above = [step for step, sigma in enumerate(sigmas) if sigma > self.kappa_sigma]
            first = above[-1] + 1 if above else 0
        history = MIN_HISTORY if self.fusion in ("variance", "off") else 0
        return range(max(first, start + history), num_steps)

    def source_blocks(self, blocks: int) -> int:
        """How many of a transformer's main blocks the source runs: beside the edit all, else up to the last to lock."""
        return blocks if self.layers is None or self.source == "batch" else 1 + max(self.layers)

    def window_steps(self, num_steps: int) -> int:
        """Number of clean predictions W the variance looks back on: at least 2, otherwise at most `num_steps`.

        Raises:
            ValueError: `num_steps` is not a positive int.
        """
        _check_count("num_steps", num_steps, smallest=1)
        return max(MIN_HISTORY, min(num_steps, _resolve_extent(self.window, num_steps)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; ``KVLockConfig(**config.to_dict())`` gives an equal object."""
        values = asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values


def _resolve_extent(extent: float, num_steps: int) -> int:
    if isinstance(extent, int):
        return extent
    # 0.07 * 100 is 7.000000000000001 in binary: without the allowance a share would round up one step too far.
    return math.ceil(extent * num_steps - 1e-9)


def _check_real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    above = f"> {low:g}" if open_low else f">= {low:g}"
    wanted = f"a finite number {above} and <= {min(high, FP32_MAX):g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not allowed; wanted {wanted}")
    if value < low or value > min(high, FP32_MAX) or (open_low and value == low):
        raise ValueError(f"{name}={value!r} is out of range; wanted {wanted}")


def _check_extent(name: str, value: object, *, smallest: int) -> None:
    wanted = f"an int >= {smallest} (steps) or a float in (0, 1] (share of the steps)"
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
    is_share = isinstance(value, float) and 0.0 < value <= 1.0
    if not (is_count or is_share):
        raise ValueError(f"{name}={value!r} is not allowed; wanted {wanted}")


def _check_count(name: str, value: object, *, smallest: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}={value!r} is not allowed; wanted an int >= {smallest}")


def _check_bool(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise ValueError(f"{name}={value!r} is not allowed; wanted True or False")


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, also: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = " ".join(filter(None, (", ".join(map(repr, choices)), also)))
        raise ValueError(f"{name}={value!r} is not allowed; wanted {wanted}")


def _checked_layers(layers: object) -> tuple[int, ...]:
    indices = tuple(layers) if isinstance(layers, tuple | list | range) else None
    if indices is None:
        raise ValueError(f"layers={layers!r} is not allowed; wanted a tuple of block indices or None for all blocks")
    if not indices:
        raise ValueError("layers=() locks no block; use fusion='off' to switch the lock off, or None for all blocks")
    for index in indices:
        _check_count("an entry of layers", index)
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers={indices!r} names a block twice; wanted each index once")
    return indices


PRESETS: Mapping[str, KVLockConfig] = MappingProxyType(
    {
        "kv-lock": KVLockConfig(),
        "plain": KVLockConfig(fusion="off", optimized_scale=False, dynamic_guidance=False),
        "cfg-zero-star": KVLockConfig(fusion="off", dynamic_guidance=False, zero_init_steps=1),
        "fixed-0.5": KVLockConfig(fusion=0.5),
        "full-lock": KVLockConfig(fusion="full", optimized_scale=False, dynamic_guidance=False),
        "kv-only": KVLockConfig(optimized_scale=False, dynamic_guidance=False),
        "omega-only": KVLockConfig(fusion="off", optimized_scale=False),
        "s-star-only": KVLockConfig(fusion="off", dynamic_guidance=False),
        "s-star-omega": KVLockConfig(fusion="off"),
        "kv-omega": KVLockConfig(optimized_scale=False),
        "kv-s-star": KVLockConfig(dynamic_guidance=False),
        "global-detection": KVLockConfig(variance="global"),
    }
)
"""The method (`kv-lock`), its baselines, and the rows of the paper's ablation."""


def preset(name: str, **overrides: Any) -> KVLockConfig:
    """The preset `name` with single settings replaced.

    Raises:
        ValueError: no such preset or setting (the message lists the known ones), or `KVLockConfig` refuses a value.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    unknown = sorted(set(overrides) - set(KVLockConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(KVLockConfig.__dataclass_fields__)
        raise ValueError(f"unknown setting {', '.join(map(repr, unknown))}; known settings: {known}")
    return replace(PRESETS[name], **overrides)
