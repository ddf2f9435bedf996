"""Layers of the backend held by hand, without a session: several samples of one source, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from kvlock import KVLockConfig, Store
from kvlock.adapters import backend_registry
from kvlock.adapters.backend import BackendLayers
from kvlock.adapters.families import locked_attentions, tapped_modules
from kvlock.adapters.fused import FusedLayers
from kvlock.adapters.taps import Taps
from kvlock.locked_layers import AFTER_ROPE, BEFORE_ROPE, LayerKey, LockState, Recorded
from kvlock.places import shelf_of

STEPS = 5
WINDOW: dict[str, Any] = {"kappa": 3, "window": 3, "tau": 0.6}


def unit_layer(
    *, full: bool, samples: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, torch.Tensor]]:
    """One layer on no model, that has recorded rows of `samples` samples; and q, k, v of four samples."""
    owner = tiny.pipeline(WanPipeline).transformer.blocks[0].attn1
    state = LockState(torch.tensor([4, 0, 2]).int(), 5, full=full)
    layers = BackendLayers(state)
    layers.install([(LayerKey("blocks", 0, "kv"), owner)])
    (layer,) = layers.holders()
    layers.record()
    layer.attend(*(tiny.rand(samples, 5, 2, 8, seed=seed).to(dtype) for seed in range(3)), scale=None)
    layers.lerp(torch.ones(4))
    return layer, {name: tiny.rand(4, 5, 2, 8, seed=seed).to(dtype) for seed, name in enumerate("qkv", start=3)}


@pytest.mark.parametrize("full", [True, False], ids=["joined", "lerped"])
@pytest.mark.parametrize(("samples", "dtype"), [(1, torch.float32), (4, torch.float32), (1, torch.bfloat16)])
def test_one_source_serves_several_samples(samples, dtype, full):
    layer, x = unit_layer(full=full, samples=samples, dtype=dtype)
    k, v = x["k"].clone(), x["v"].clone()
    k[:, [4, 0, 2]] = tiny.rand(samples, 5, 2, 8, seed=1)[:, [4, 0, 2]].to(dtype)
    v[:, [4, 0, 2]] = tiny.rand(samples, 5, 2, 8, seed=2)[:, [4, 0, 2]].to(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (x["q"], k, v)), scale=0.3)
    for _ in range(2):  # the second time the buffer holds another's foreground
        found = layer.attend(*(y.clone() for y in x.values()), scale=0.3)
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found, expected.transpose(1, 2), **close)


def test_a_full_lock_writes_the_foreground_behind_the_recorded_rows_and_copies_no_others():
    layer, x = unit_layer(full=True, samples=4)
    for tensor in "kv":
        kept = layer.source_rows(tensor, AFTER_ROPE)
        before = kept.data[:, :3].clone()
        joined = layer._joined(kept, x[tensor])
        assert joined.data_ptr() == kept.data.data_ptr() and joined.shape == x[tensor].shape
        assert torch.equal(joined[:, :3], before) and torch.equal(joined[:, 3:], x[tensor][:, [1, 3]])


def test_samples_of_one_source_take_turns_with_the_room_behind_it():
    layer, x = unit_layer(full=True, samples=1)
    kept = {tensor: layer.source_rows(tensor, AFTER_ROPE).data for tensor in "kv"}
    before = {tensor: data.clone() for tensor, data in kept.items()}
    layer.attend(*(y.clone() for y in x.values()), scale=None)
    for tensor, data in kept.items():
        assert torch.equal(data[:, :3], before[tensor][:, :3])
        assert torch.equal(data[0, 3:], x[tensor][3, [1, 3]])  # of the last sample


def test_source_rows_of_another_number_of_samples_are_refused():
    layer, x = unit_layer(full=True, samples=2)
    with pytest.raises(ValueError, match=r"blocks\[0\] has source rows of 2 samples; wanted 1 or 4"):
        layer.attend(*x.values(), scale=None)


def test_a_processor_that_stops_calling_the_dispatcher_is_named():
    pipe = tiny.pipeline(WanPipeline)
    attention = pipe.transformer.blocks[1].attn1
    attention.set_processor(Undispatched())
    message = r"blocks\[1\] ran past the lock"
    with pytest.raises(ValueError, match=message), tiny.attached(pipe, KVLockConfig(**WINDOW), kernel="backend"):
        tiny.call(pipe, steps=STEPS)
    assert tiny.leftovers(pipe) == []


class Undispatched(WanAttnProcessor):
    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda a: setattr(a[1], "processor", lambda *args: args[1]),
            "its function does not use diffusers' dispatcher",
        ),
        (lambda a: setattr(a[1].processor, "_parallel_config", object()), "split over several devices"),
        (lambda a: setattr(a[1], "processor", a[0].processor), "another layer has the same processor"),
    ],
    ids=["no-dispatcher", "parallel", "shared-processor"],
)
@pytest.mark.parametrize("chosen", ["at-once", "later"])
def test_what_the_backend_cannot_serve_is_refused_with_the_reason_and_hooks_go_on(change, reason, chosen):
    pipe = tiny.pipeline(WanPipeline)
    attentions = [block.attn1 for block in pipe.transformer.blocks]
    message = r'kernel="backend" does not fit blocks\[1\]: .*' + reason + '.*use kernel="hooks"'
    if chosen == "at-once":
        change(attentions)
        with pytest.raises(ValueError, match=message), tiny.attached(pipe, KVLockConfig(), kernel="backend"):
            pass
    else:
        with tiny.attached(pipe, KVLockConfig(**WINDOW)):
            plain = attentions[1].processor
            change(attentions)
            with pytest.raises(ValueError, match=message):
                pipe.transformer.set_attention_backend("kvlock")
            attentions[1].processor = plain
            vars(plain).clear()
            expected = tiny.call(pipe, steps=STEPS)
        assert torch.equal(tiny.locked_call(pipe, KVLockConfig(**WINDOW), steps=STEPS)[0], expected)
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": torch.ones(4, 5)},
        {"dropout_p": 0.1},
        {"is_causal": True},
        {"enable_gqa": True},
        {"attention_kwargs": {"return_lse": True}},
        {"parallel_config": object()},
    ],
    ids=lambda given: next(iter(given)),
)
def test_an_argument_that_a_locked_layer_has_no_use_for_is_refused_by_name(given):
    layer, x = unit_layer(full=False, samples=4)
    argument = next(iter(given.get("attention_kwargs", given)))
    member = backend_registry.register()
    backend_registry.announce(layer)
    with pytest.raises(ValueError, match=rf'blocks\[0\] calls its attention with {argument}.*use kernel="hooks"'):
        dispatch_attention_fn(*x.values(), backend=member, **given)


def test_a_mask_of_another_size_is_refused_by_name():
    pipe = tiny.pipeline(WanPipeline)
    layers = BackendLayers(LockState(torch.tensor([0]).int(), 7))
    layers.install(locked_attentions(pipe.transformer, KVLockConfig()))
    layers.record()
    with pytest.raises(ValueError, match=rf"\[0\] has {tiny.TOKENS} tokens, not 7; the mask was made for another"):
        tiny.call(pipe, steps=1)
    layers.remove()
    assert tiny.leftovers(pipe) == []


def test_a_layer_without_source_rows_says_so():
    layer, x = unit_layer(full=False, samples=1)
    layer.v_source = None
    with pytest.raises(ValueError, match=r"blocks\[0\] has no source rows for v; record them first"):
        layer.attend(*x.values(), scale=None)


@pytest.mark.parametrize(
    "kind, parts_of, mixes, other",
    [
        (Taps, tapped_modules, BEFORE_ROPE, AFTER_ROPE),
        (FusedLayers, locked_attentions, BEFORE_ROPE, AFTER_ROPE),
        (BackendLayers, locked_attentions, AFTER_ROPE, BEFORE_ROPE),
    ],
    ids=["hooks", "fused", "backend"],
)
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_source_rows_of_the_other_point_are_refused_by_name(kind, parts_of, mixes, other, place):
    pipe = tiny.pipeline(WanPipeline)
    masks = tiny.masks(pipe)
    shelf = shelf_of(Store(place=place))
    layers = kind(LockState(masks.index, masks.num_tokens, shelf=shelf))
    layers.install(parts_of(pipe.transformer, KVLockConfig()))
    layers.record()
    if shelf is not None:
        shelf.serve(torch.device("cpu"), [(0, "blocks", 0), (0, "blocks", 1)])
        shelf.turn_to(0)
    tiny.call(pipe, steps=1, guidance_scale=1.0)
    if shelf is not None:
        shelf.seal()
    layers.lerp(torch.full((1,), 0.5))
    tiny.call(pipe, steps=1, guidance_scale=1.0)  # its own rows serve
    if shelf is None:
        for holder in layers.holders():
            for name in ("k_source", "v_source"):
                own = getattr(holder, name)
                if own is not None:
                    assert own.point == mixes
                    setattr(holder, name, Recorded(own.rows, other))
    else:
        assert set(shelf.points.values()) == {mixes} and len(shelf.points) == 4
        shelf.points.update(dict.fromkeys(shelf.points, other))
    with pytest.raises(ValueError, match=rf"blocks\[0\] has source rows recorded {other} and mixes {mixes}"):
        tiny.call(pipe, steps=1)
    layers.remove()
    if shelf is not None:
        shelf.close()
