"""The lock inside the attention itself: diffusers' dispatcher hands over q, k and v after norm and RoPE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from kvlock.adapters import backend_registry
from kvlock.locked_layers import (
    AFTER_ROPE,
    BATCH,
    OFF,
    RECORD,
    Holder,
    LayerKey,
    LockedLayers,
    LockState,
    require_same,
)
from kvlock.store import Rows
from kvlock_kernels import kv_lerp_attention_

_ABSENT = object()  # of a processor that has its class's backend


class BackendLayer(Holder):
    """One attention module, whose attention goes through "kvlock" in the calls that record source rows or lerp them in.

    In all others its processor has the backend that was active before, and the module is as it was.
    """

    def __init__(self, key: LayerKey, shared: LockState, attention: Any, member: Any) -> None:
        super().__init__(key, shared)
        self.attention = attention
        self.processor = attention.processor
        self._member = member
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._note_backend()

    def _note_backend(self) -> None:
        self.inner: Any = self.processor._attention_backend  # what was active before "kvlock"; None is the process's
        self._own: Any = vars(self.processor).get("_attention_backend", _ABSENT)

    def arm(self) -> None:
        """Go through "kvlock"; a backend set since the last time becomes the one that was active before.

        Raises:
            ValueError: the processor has been replaced.
        """
        processor = self.attention.processor
        if processor is not self.processor:
            raise self.replaced_by(processor)
        if processor._attention_backend is not self._member:
            self._note_backend()
            processor._attention_backend = self._member
        if self._hook is None:
            self.attention.kvlock_layer = self
            self._hook = self.attention.register_forward_pre_hook(announce_hook)

    def rest(self) -> None:
        """Undo `arm`; a backend set since then stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.attention.kvlock_layer
        if self.processor._attention_backend is self._member:
            if self._own is _ABSENT:
                del self.processor._attention_backend
            else:
                self.processor._attention_backend = self._own

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        """Attention [B, N, H, D] to k and v, all [B, N, H, D], after norm and RoPE; k and v are used up."""
        shared = self.shared
        self.require_tokens(k.shape[1])
        self.reached = True
        if shared.mode == RECORD:
            self._record("k", k)
            self._record("v", v)
            return self._attend_as_before(q, k, v, scale)
        if shared.mode == BATCH:
            return self._attend_beside(q, k, v, scale)
        k_source, v_source = self.source_rows("k", AFTER_ROPE), self.source_rows("v", AFTER_ROPE)
        if shared.full:
            return self._attend_to_joined(q, k, v, k_source, v_source, scale)
        options = k_source.options("k") | v_source.options("v")
        return kv_lerp_attention_(
            q, k, v, k_source.data, v_source.data, shared.index, shared.ratio, scale=scale, **options
        )

    def _record(self, tensor: str, x: Tensor) -> None:
        """Keep the background rows of x [Bs, N, H, D]; of a full lock with room for the edit's others behind them."""
        shared = self.shared
        with_room = shared.full and shared.shelf is None and not shared.store.packs
        index = shared.order if with_room else shared.index
        self.keep(tensor, shared.store.keep(x, index, x.shape[2], keys=tensor == "k"), AFTER_ROPE)

    def _attend_to_joined(
        self, q: Tensor, k: Tensor, v: Tensor, k_source: Rows, v_source: Rows, scale: float | None
    ) -> Tensor:
        """Attention to source rows and foreground ones; samples of one source take turns with the room behind it."""
        if len(k_source.data) == 1 < len(k) and self._has_room(k_source, k):
            samples = zip(q.split(1), k.split(1), v.split(1), strict=True)
            return torch.cat([self._attend_to_joined(*sample, k_source, v_source, scale) for sample in samples])
        return self._attend_as_before(q, self._joined(k_source, k), self._joined(v_source, v), scale)

    def _has_room(self, kept: Rows, x: Tensor) -> bool:
        """Whether the foreground rows of x [B, N, H, D] fit behind the source rows."""
        return kept.data.shape[1] == x.shape[1] and not self.shared.store.packs

    def _joined(self, kept: Rows, x: Tensor) -> Tensor:
        """Source rows, then the foreground rows of x [B, N, H, D]: attention does not ask for the order of its keys."""
        rows, foreground, source = self.shared.rows, self.shared.foreground, kept.unpacked(x.dtype)
        if len(source) == len(x) and self._has_room(kept, x):
            torch.index_select(x, 1, foreground, out=source[:, rows:])
            return source
        if len(source) not in (1, len(x)):
            raise ValueError(f"{self.name} has source rows of {len(source)} samples; wanted 1 or {len(x)}")
        return torch.cat([source[:, :rows].expand(len(x), -1, -1, -1), x.index_select(1, foreground)], dim=1)

    def _attend_beside(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """The source's samples come first in the batch, the edit's after them."""
        shared, edit = self.shared, self.shared.source_batch
        k_source, v_source = (x[:edit].index_select(1, shared.index) for x in (k, v))
        if shared.full:
            for x, source in ((k, k_source), (v, v_source)):
                x[edit:].index_copy_(1, shared.index.long(), source.expand(len(x) - edit, -1, -1, -1))
            return self._attend_as_before(q, k, v, scale)
        plain = self._attend_as_before(q[:edit], k[:edit], v[:edit], scale)
        mixed = kv_lerp_attention_(
            q[edit:], k[edit:], v[edit:], k_source, v_source, shared.index, shared.ratio, scale=scale
        )
        return torch.cat([plain, mixed])

    def _attend_as_before(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return dispatch_attention_fn(q, k, v, scale=scale, backend=self.inner)


def announce_hook(module: Any, args: tuple) -> None:
    """Before an attention module runs: the backend's next call is its layer's."""
    backend_registry.announce(module.kvlock_layer)


def check_fit(key: LayerKey, attention: Any) -> None:
    """Refuse an attention module whose attention does not go through diffusers' dispatcher, or only in part.

    Raises:
        ValueError: says what does not fit.
    """
    where, instead = f'kernel="backend" does not fit {key.name}', 'use kernel="hooks"'
    processor = attention.processor
    if not hasattr(processor, "_attention_backend"):
        raise ValueError(f"{where}: its {type(processor).__name__} does not use diffusers' dispatcher; {instead}")
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(f"{where}: its tokens are split over several devices; {instead}")


class BackendLayers(LockedLayers):
    """All layers of a session that go through the backend, and diffusers' default backend while they are held.

    Raises:
        RuntimeError: this diffusers has no place for the backend.
    """

    point = AFTER_ROPE

    def __init__(self, shared: LockState) -> None:
        super().__init__(shared)
        self._member = backend_registry.register()
        self._default = backend_registry.default_backend()
        self._layers: list[BackendLayer] = []

    def install(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        for key, attention in parts:
            check_fit(key, attention)
            where, processor = key.name, attention.processor
            if self._member in (processor._attention_backend, self._default):
                raise ValueError(f"{where} has no backend to go back to: {backend_registry.HOW}")
            if any(layer.processor is processor for layer in self._layers):
                raise ValueError(
                    f'kernel="backend" does not fit {where}: another layer has the same processor; use kernel="hooks"'
                )
            self._layers.append(BackendLayer(key, self.shared, attention, self._member))

    def holders(self) -> Iterable[BackendLayer]:
        return self._layers

    def require_same(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        found = list(parts)
        require_same(found, [layer.attention for layer in self._layers])
        for key, attention in found:
            check_fit(key, attention)

    def remove(self) -> None:
        self.off()
        self._layers.clear()
        if backend_registry.default_backend() is self._member:  # by way of a model that is not attached
            backend_registry.set_default_backend(self._default)

    def _switch(self, mode: int) -> None:
        super()._switch(mode)  # first, so that a refusal half-way is undone by going OFF
        backend_registry.announce(None)  # one that an exception kept from its attention
        for layer in self._layers:
            layer.rest() if mode == OFF else layer.arm()
