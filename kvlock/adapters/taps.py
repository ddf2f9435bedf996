"""Forward hooks on the key norm and the value projection of self-attention: they record source rows or lerp them in."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kvlock.locked_layers import (
    BATCH,
    BEFORE_ROPE,
    OFF,
    RECORD,
    Holder,
    LayerKey,
    LockedLayers,
    LockState,
    require_same,
)
from kvlock_kernels import kv_lerp_


class Tap(Holder):
    """The state of one tapped module; hooks find it there, so that one function serves every layer."""

    def __init__(self, key: LayerKey, shared: LockState, plain_class: type[nn.Module]) -> None:
        super().__init__(key, shared)
        self.tensor = key.tensor
        self.plain_class = plain_class  # of the module


def tap_hook(module: Any, args: tuple, output: Tensor) -> Tensor | None:
    """Record the background rows of `output`, or lerp the recorded ones into it in place, as the session says."""
    tap: Tap = module.kvlock_tap
    shared = tap.shared
    if shared.mode == OFF:
        return None
    rows = _token_rows(output, shared.num_tokens, tap.key)
    tap.reached = True
    if shared.mode == RECORD:
        recorded = shared.store.keep(rows, shared.index, tap.key.heads, keys=tap.tensor == "k")
        tap.keep(tap.tensor, recorded, BEFORE_ROPE)
        return None
    if shared.mode == BATCH:
        edit, source = rows[shared.source_batch :], rows[: shared.source_batch].index_select(1, shared.index)
        kv_lerp_(edit, source, shared.index, shared.ratio)
    else:
        mixed_in = tap.source_rows(tap.tensor, BEFORE_ROPE)
        kv_lerp_(rows, mixed_in.data, shared.index, shared.ratio, **mixed_in.options("source"))
    return output


def _token_rows(output: Tensor, num_tokens: int, key: LayerKey) -> Tensor:
    """`output` as a view with tokens on axis 1: families differ between [B, N, C], [B, N, H, D] and [B, H, N, D]."""
    if output.ndim in (3, 4) and output.shape[1] == num_tokens:
        return output
    if output.ndim == 4 and output.shape[2] == num_tokens:
        return output.transpose(1, 2)
    raise ValueError(
        f"{key.name} gives {key.tensor} of shape {list(output.shape)}, "
        f"which has no axis of {num_tokens} tokens; the mask was made for another size"
    )


@functools.cache  # one class for all sessions, so that their graphs are reused
def _tapped_class(plain_class: type[nn.Module]) -> type[nn.Module]:
    """The same class under another identity.

    Compiled graphs are guarded on the types of modules but not on their hooks: a graph made before the hooks came would
    go on without them. A module of this type makes it compile, and its plain type brings the old graph back. The type
    is one of this package, because tensors found in a module of torch's own have one graph for each of their sizes.
    """
    return type(plain_class.__name__, (plain_class,), {"__module__": __name__})


class Taps(LockedLayers):
    """All taps of a session, put on by `install` and taken off by `remove`."""

    point = BEFORE_ROPE

    def __init__(self, shared: LockState) -> None:
        super().__init__(shared)
        self._modules: list[Any] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        for key, module in parts:
            if hasattr(module, "kvlock_tap"):
                raise ValueError(f"{key.name} is attached already; leave that context first")
            module.kvlock_tap = Tap(key, self.shared, type(module))
            self._modules.append(module)
            self._handles.append(module.register_forward_hook(tap_hook))

    def holders(self) -> Iterable[Tap]:
        return [module.kvlock_tap for module in self._modules]

    def require_same(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        require_same(parts, self._modules)

    def remove(self) -> None:
        self.off()
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            del module.kvlock_tap
        self._handles.clear()
        self._modules.clear()

    def _switch(self, mode: int) -> None:
        if (mode == OFF) != (self.shared.mode == OFF):
            for module in self._modules:
                plain = module.kvlock_tap.plain_class
                module.__class__ = plain if mode == OFF else _tapped_class(plain)
        super()._switch(mode)
