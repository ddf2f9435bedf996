"""An attention processor for Wan in which QK norm, RoPE and the lock are one pass over the projections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
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
from kvlock.store import Rows
from kvlock_kernels import qk_norm_rope_kv_lerp_, qk_norm_rope_kv_pack_


class FusedWanProcessor(Holder):
    """Takes the place of a layer's `WanAttnProcessor` in the calls that record source rows or lerp them in.

    Keys are recorded between norm and RoPE, where the taps record them too. Any attention backend follows.
    """

    def __init__(self, key: LayerKey, shared: LockState, plain: WanAttnProcessor) -> None:
        super().__init__(key, shared)
        self.plain = plain

    @property
    def _attention_backend(self) -> Any:  # what set_attention_backend chooses belongs to the plain processor
        return self.plain._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.plain._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        self._check(q, encoder_hidden_states, rotary_emb)
        assert rotary_emb is not None
        cos, sin = (angles.flatten(0, 2) for angles in rotary_emb)  # [1, N, 1, D] in diffusers
        self._norm_rope(attn, q, k, v, cos, sin)
        self.reached = True
        out = dispatch_attention_fn(
            *(x.view(*x.shape[:2], attn.heads, -1) for x in (q, k, v)),  # unflatten: not compiled inside torch.device
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
        )
        out = attn.to_out[0](out.flatten(2).type_as(q))
        return attn.to_out[1](out)

    def _norm_rope(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> None:
        shared, eps = self.shared, attn.norm_q.eps
        layer = (attn.norm_q.weight, attn.norm_k.weight, cos, sin)
        if shared.mode == RECORD:
            dtype = shared.store.storage_dtype(q.dtype)
            rows = qk_norm_rope_kv_pack_(q, k, v, *layer, shared.source_row, shared.rows, dtype, eps=eps)
            self.keep("k", Rows(*rows.k), BEFORE_ROPE)
            self.keep("v", Rows(*rows.v), BEFORE_ROPE)
            return
        edit = 0
        if shared.mode == BATCH:
            edit = shared.source_batch
            rows = qk_norm_rope_kv_pack_(
                q[:edit], k[:edit], v[:edit], *layer, shared.source_row, shared.rows, q.dtype, eps=eps
            )
            k_source, v_source = Rows(*rows.k), Rows(*rows.v)
        else:
            k_source, v_source = self.source_rows("k", BEFORE_ROPE), self.source_rows("v", BEFORE_ROPE)
        packing: dict[str, Any] = k_source.options("k") | v_source.options("v")
        sources = (k_source.data, v_source.data, shared.source_row, shared.ratio)
        qk_norm_rope_kv_lerp_(q[edit:], k[edit:], v[edit:], *layer, *sources, eps=eps, **packing)

    def _check(self, q: Tensor, encoder_hidden_states: Tensor | None, rotary_emb: Any) -> None:
        if encoder_hidden_states is not None or rotary_emb is None:
            raise ValueError(f'{self.name} is not called as self-attention with RoPE; wanted that with kernel="fused"')
        self.require_tokens(q.shape[1])


def check_fit(key: LayerKey, attention: Any) -> None:
    """Refuse an attention module whose norm and RoPE are not those of Wan's self-attention.

    Raises:
        ValueError: says what does not fit.
    """
    where, instead = f'kernel="fused" does not fit {key.name}', 'use kernel="hooks"'
    processor = type(attention.processor)
    if processor is not WanAttnProcessor:
        raise ValueError(f"{where}: its processor is {processor.__name__}, wanted WanAttnProcessor; {instead}")
    if getattr(attention.processor, "_parallel_config", None) is not None:
        raise ValueError(f"{where}: its tokens are split over several devices; {instead}")
    width = attention.to_q.out_features
    for name in ("norm_q", "norm_k"):
        norm = getattr(attention, name)
        if type(norm) is not nn.RMSNorm or norm.weight is None or tuple(norm.normalized_shape) != (width,):
            raise ValueError(f"{where}: {name} is {norm}, wanted an RMSNorm with weights over {width}; {instead}")
        hooks = norm._forward_hooks or norm._forward_pre_hooks
        if hooks or hasattr(norm, "_hf_hook") or hasattr(norm, "_diffusers_hook"):
            raise ValueError(f"{where}: {name} has hooks, and its weights are read without calling it; {instead}")
    if attention.norm_q.eps is None or attention.norm_q.eps != attention.norm_k.eps:
        eps = f"{attention.norm_q.eps} and {attention.norm_k.eps}"
        raise ValueError(f"{where}: norm_q and norm_k have eps {eps}, wanted one number; {instead}")


class FusedLayers(LockedLayers):
    """All fused processors of a session; a call in which nothing is locked finds the plain ones in their places."""

    point = BEFORE_ROPE

    def __init__(self, shared: LockState) -> None:
        super().__init__(shared)
        self._layers: list[tuple[Any, FusedWanProcessor]] = []  # attention modules and their fused processors

    def install(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        for key, attention in parts:
            check_fit(key, attention)
            self._layers.append((attention, FusedWanProcessor(key, self.shared, attention.processor)))

    def holders(self) -> Iterable[FusedWanProcessor]:
        return [fused for _, fused in self._layers]

    def require_same(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        found = list(parts)
        require_same(found, [attention for attention, _ in self._layers])
        for key, attention in found:
            check_fit(key, attention)

    def remove(self) -> None:
        self.off()
        self._layers.clear()

    def _switch(self, mode: int) -> None:
        was_off = self.shared.mode == OFF
        super()._switch(mode)  # first, so that a refusal half-way is undone by going OFF
        for attention, fused in self._layers:
            if mode == OFF:
                if attention.processor is fused:  # another's stays where it is
                    attention.set_processor(fused.plain)
            elif attention.processor is not (fused.plain if was_off else fused):
                raise fused.replaced_by(attention.processor)
            elif was_off:
                attention.set_processor(fused)
