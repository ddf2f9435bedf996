"""What an edit will cost, from sizes alone: forward passes and the memory of source keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvlock.config import KVLockConfig
from kvlock.geometry import patch_of
from kvlock.store import LAYERS_AT_ONCE, LAYERS_ON_DEVICE, Store

KERNELS = ("hooks", "fused", "backend")  # as `kvlock.attach` knows them


class ModelSizes(NamedTuple):
    """The sizes of a transformer that decide the memory of its keys and values, and of its predictions."""

    layers: int  # main blocks
    heads: int
    head_dim: int
    token_values: int  # of the latents that one token stands for: channels times the sides of its patch
    control_layers: int = 0  # VACE's control blocks
    joint_branches: bool = False  # whether one forward has both guidance branches, which the config does not say

    @classmethod
    def of(cls, transformer_config: Any) -> ModelSizes:
        """Read them from a diffusers transformer's config, by attribute.

        Raises:
            ValueError: the config names no layers, heads, head dimension, channels or patch.
        """
        patch = patch_of(transformer_config)
        return cls(
            layers=_size(transformer_config, "num_layers"),
            heads=_size(transformer_config, "num_attention_heads"),
            head_dim=_size(transformer_config, "attention_head_dim"),
            token_values=_size(transformer_config, "in_channels") * math.prod(patch),
            control_layers=len(getattr(transformer_config, "vace_layers", None) or ()),
        )


def _size(config: Any, name: str) -> int:
    size = getattr(config, name, None)
    if not isinstance(size, int):
        raise ValueError(f"the transformer's config has {name}={size!r}; wanted an int")
    return size


class Cost(NamedTuple):
    """The cost of one edit of one video; bytes count K and V of all locked layers for one step, and predictions."""

    tokens: int
    background_rows: int  # tokens whose K and V are locked
    steps: int  # that run
    locked_steps: int  # steps on which the source runs as well, at most
    forwards_plain: int  # rows through the transformer without KV-Lock
    forwards: int  # the same with the source
    source_blocks: int  # main blocks that a forward of the source runs, all if offloaded; 0 without one
    bytes_full: int  # of all tokens
    bytes_background: int  # of background rows
    bytes_kept: int  # what the run holds, wherever: bytes_background at most times, 0 where nothing is stored
    bytes_device: int  # of these on the device: all, or two layers of a store in another place
    bytes_host: int  # in host memory, where the device is not the host: all, or three layers on their way to the disk
    bytes_disk: int
    bytes_moved: int  # between device and place in a locked step: written once, read for every call
    bytes_recording: int  # of all locked steps, which `kvlock record` writes
    bytes_moved_replay: int  # in a locked step of an edit from a recording: read for every call
    bytes_predictions: int  # of the clean predictions that the variance looks back on, with or without a lock


def estimate(
    model: ModelSizes,
    config: KVLockConfig,
    *,
    tokens: int,
    background_rows: int,
    num_steps: int = 50,
    start: int = 0,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float = 5.0,
    bytes_per_value: int = 2,
    store: Store | None = None,
    kernel: str = "hooks",
) -> Cost:
    """The cost of one edit.

    With K steps of which L are locked, and both branches guided and locked::

        forwards = 2 K                 without KV-Lock
        forwards = 2 K + L             source="store": the source runs once and serves both branches
        forwards = 2 K + 2 L           source="batch": the source runs beside each branch and is never stored;
                                       once a step, 2 K + L, where a call of the transformer has both branches

    Where a second transformer takes over inside the window, L counts its first two steps, which ``fusion="variance"``
    does not lock: such a run takes less than this. A stored source runs up to the last main block that locks, and
    counts as a whole forward all the same. The rows of a step take::

        bytes    = layers * 2 * rows * heads * head_dim * bytes_per_value, in 8 bits (head_dim + 4) for the last two

    The predictions are the guided and the conditional ones of a window of W steps, in fp32::

        bytes    = 2 * W * tokens * token_values * 4

    Args:
        tokens: video tokens the transformer sees, reference frames included.
        background_rows: how many of them are locked.
        num_steps: denoising steps of the scheduler's table.
        start: index at which a video-to-video run enters the table, so that K = num_steps - start.
        sigmas: noise share of each step; needed where the config gives its window as `kappa_sigma`.
        guidance_scale: the pipeline's own; at most 1 means that there is no unconditional branch.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32.
        store: how and where source rows are kept; None is on the device, in the dtype of the model.
        kernel: where the lock acts, as for `kvlock.attach`: a full lock by the backend keeps room on the device for the
            foreground rows too, where the rows have the dtype of the model.

    Raises:
        ValueError: the kernel is not known, the rows exceed the tokens, the guidance scale is not finite, the run has
            no step, the config locks blocks that are not there, or as `KVLockConfig.locked_steps`.
    """
    if not 0 <= background_rows <= tokens:
        raise ValueError(f"background_rows={background_rows} is out of range; wanted 0 to {tokens}, the tokens")
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not known; wanted one of {', '.join(map(repr, KERNELS))}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} is not allowed; wanted a finite number")
    beyond = [layer for layer in config.layers or () if layer >= model.layers]
    if beyond:
        raise ValueError(f"layers names block {beyond[0]}; the transformer has {model.layers}, numbered from 0")
    if not 0 <= start < num_steps:
        raise ValueError(f"start={start} lies outside a table of {num_steps} steps")
    locked = len(config.locked_steps(num_steps, sigmas, start=start)) if config.locks else 0
    branches = 2 if guidance_scale > 1 else 1
    locked_branches = 1 if config.branches != "both" else branches
    if config.branches == "uncond" and branches == 1:
        locked = 0
    locked_calls = 1 if model.joint_branches else locked_branches
    plain = branches * (num_steps - start)
    layers = len(config.layers) if config.layers is not None else model.layers
    layers += model.control_layers if config.control_blocks else 0
    store = Store() if store is None else store
    full, background = (
        layers * store.bytes_of(rows, model.heads, model.head_dim, bytes_per_value)
        for rows in (tokens, background_rows)
    )
    stores = config.source == "store" and locked > 0
    elsewhere = store.place != "device"
    for_all = config.fusion == "full" and (config.branches == "both" or not model.joint_branches)  # samples of a call
    with_room = kernel == "backend" and for_all and not elsewhere and not store.packs
    kept = (full if with_room else background) if stores else 0
    passing, written = (kept * min(n, layers) // layers for n in (LAYERS_ON_DEVICE, 1 + LAYERS_AT_ONCE))
    # Every call needs every layer, and after the last one the first sets off once more; two layers just stay.
    passes = locked_calls * layers + 1 if layers > LAYERS_ON_DEVICE else layers
    recorded = background if stores else 0
    return Cost(
        tokens=tokens,
        background_rows=background_rows,
        steps=num_steps - start,
        locked_steps=locked,
        forwards_plain=plain,
        forwards=plain + locked * (1 if config.source == "store" else locked_calls),
        source_blocks=config.source_blocks(model.layers) if locked else 0,
        bytes_full=full,
        bytes_background=background,
        bytes_kept=kept,
        bytes_device=passing if elsewhere else kept,
        bytes_host={"device": 0, "host": kept, "disk": written}[store.place],
        bytes_disk=kept if store.place == "disk" else 0,
        bytes_moved=kept + kept * passes // layers if elsewhere else 0,
        bytes_recording=recorded * locked,
        bytes_moved_replay=recorded * passes // layers,
        bytes_predictions=2 * config.window_steps(num_steps) * tokens * model.token_values * 4,
    )


def byte_unit(largest: float) -> tuple[int, str]:
    """The unit in which to say so many bytes, and its name; 1 below a KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= unit:
            return unit, name
    return 1, "bytes"
