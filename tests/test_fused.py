"""kernel="fused": the lock inside one pass with Wan's QK norm and RoPE agrees with the lock by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline
from diffusers.hooks import HookRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch._dynamo.utils import counters

import kvlock
from kvlock import KVLockConfig, preset
from kvlock.adapters.families import locked_attentions
from kvlock.adapters.fused import FusedLayers, FusedWanProcessor
from kvlock.locked_layers import LockState

STEPS = 5
WINDOW: dict[str, Any] = {"kappa": 3, "window": 3, "tau": 0.6}
KINDS = {"wan": WanPipeline, "vace": WanVACEPipeline}
SETTINGS: dict[str, dict[str, Any]] = {
    "store": {},
    "batch": {"source": "batch"},
    "full-lock": {"fusion": "full"},
    "fixed-0.5-batch": {"fusion": 0.5, "source": "batch"},
    "uncond-branch-only": {"branches": "uncond"},
    "layer-1-only": {"layers": (1,)},
}


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny.pipeline(kind) for name, kind in KINDS.items()}


def attach(pipe, config: KVLockConfig | None = None, *, kernel: str = "fused"):
    return kvlock.attach(
        pipe,
        tiny.source_latents(),
        tiny.masks(pipe),
        config=config or KVLockConfig(**WINDOW),
        source_prompt_embeds=tiny.SOURCE_PROMPT,
        kernel=kernel,
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_fused_pass_agrees_with_the_hooks(pipes, name, settings):
    config = KVLockConfig(**(WINDOW | settings))
    expected, trace = tiny.locked_call(pipes[name], config, steps=STEPS)
    latents, fused_trace = tiny.locked_call(pipes[name], config, steps=STEPS, kernel="fused")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert [row["source_bytes"] for row in fused_trace] == [row["source_bytes"] for row in trace]
    assert not torch.equal(expected, tiny.call(pipes[name], steps=STEPS))


def test_control_blocks_agree_with_the_hooks(pipes):
    config = KVLockConfig(**WINDOW, control_blocks=True)
    expected, _ = tiny.locked_call(pipes["vace"], config, steps=STEPS)
    without, _ = tiny.locked_call(pipes["vace"], KVLockConfig(**WINDOW), steps=STEPS)
    latents, _ = tiny.locked_call(pipes["vace"], config, steps=STEPS, kernel="fused")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, without, rtol=1e-5, atol=1e-5)


def test_the_norms_eps_is_the_modules():
    pipe, config = tiny.pipeline(WanPipeline), KVLockConfig(**WINDOW)
    usual, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="fused")
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.eps = block.attn1.norm_k.eps = 1e-2
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    latents, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="fused")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(latents, usual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["store", "batch"])
def test_exactly_one_place_lerps(pipes, source):
    config = KVLockConfig(**WINDOW, source=source)
    layers, branches = 2, 2
    for kernel, lerp, lerps in (("hooks", "kv_lerp_", 2 * layers), ("fused", "qk_norm_rope_kv_lerp_", layers)):
        with tiny.Operators() as operators:
            _, trace = tiny.locked_call(pipes["wan"], config, steps=STEPS, kernel=kernel)
        locked = sum(row["locked"] for row in trace)
        assert locked == 3
        others = {"kv_lerp_", "kv_lerp_pair_", "qk_norm_rope_kv_lerp_"} - {lerp}
        others |= {"kv_lerp_attention", "kv_lerp_attention_"}
        assert operators.counts[lerp] == lerps * branches * locked
        assert not others & set(operators.counts)
        passes = locked * (branches if source == "batch" else 1)
        assert operators.counts["qk_norm_rope_kv_pack_"] == (layers * passes if kernel == "fused" else 0)


def test_a_shared_source_serves_two_samples(pipes):
    config = KVLockConfig(**WINDOW)
    extra = {name: embeds.expand(2, -1, -1) for name, embeds in tiny.PROMPT.items()}
    extra["latents"] = tiny.rand(2, *tiny.LATENT, seed=3)
    expected, _ = tiny.locked_call(pipes["wan"], config, steps=STEPS, **extra)
    latents, _ = tiny.locked_call(pipes["wan"], config, steps=STEPS, kernel="fused", **extra)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind_also_after_an_exception(pipes):
    pipe = pipes["vace"]
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    before = tiny.call(pipe, steps=2)

    def interrupt(_pipe, step, timestep, kwargs):
        if step == STEPS - 2:  # a locked one, so that the fused processors are in their places
            assert all(type(block.attn1.processor) is FusedWanProcessor for block in pipe.transformer.blocks)
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt), attach(pipe):
        tiny.call(pipe, steps=STEPS, callback_on_step_end=interrupt)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert tiny.leftovers(pipe) == []
    assert torch.equal(tiny.call(pipe, steps=2), before)


def test_preset_plain_puts_no_processor_on_and_is_bit_identical(pipes):
    pipe = pipes["wan"]
    with tiny.attached(pipe, preset("plain"), kernel="fused"):
        assert all(type(block.attn1.processor) is WanAttnProcessor for block in pipe.transformer.blocks)
        latents = tiny.call(pipe, steps=STEPS)
    assert torch.equal(latents, tiny.call(pipe, steps=STEPS))


def test_calls_outside_the_window_are_the_pipelines_own(pipes):
    """Latents are compared where the window begins, before the lock has touched them."""
    pipe, seen = pipes["wan"], []
    config = KVLockConfig(kappa=2, window=3, tau=0.6, optimized_scale=False, dynamic_guidance=False)

    def keep(_pipe, step, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        return kwargs

    tiny.call(pipe, steps=STEPS, callback_on_step_end=keep)
    _, trace = tiny.locked_call(pipe, config, steps=STEPS, kernel="fused", callback_on_step_end=keep)
    free = sum(not row["locked"] for row in trace)
    assert free == 3
    plain, fused = seen[:STEPS], seen[STEPS:]
    assert all(torch.equal(a, b) for a, b in zip(plain[:free], fused[:free], strict=True))
    assert not torch.equal(plain[-1], fused[-1])


def test_an_attention_backend_chosen_inside_the_block_serves_the_fused_pass_and_stays():
    pipe, seen = tiny.pipeline(WanPipeline), set()
    expected, _ = tiny.locked_call(pipe, KVLockConfig(**WINDOW), steps=STEPS)

    def backends() -> set[str]:
        return {str(block.attn1.processor._attention_backend) for block in pipe.transformer.blocks}

    def look(_pipe, step, timestep, kwargs):
        seen.update(backends())
        return kwargs

    try:
        with tiny.attached(pipe, KVLockConfig(**WINDOW), kernel="fused"):
            pipe.transformer.set_attention_backend("_native_math")
            latents = tiny.call(pipe, steps=STEPS, callback_on_step_end=look)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        assert backends() == seen and len(seen) == 1 and "MATH" in seen.pop().upper()
    finally:
        pipe.transformer.set_attention_backend("native")  # the process-wide default too


@pytest.mark.parametrize("source, most", [("store", 2), ("batch", 1)])
def test_regional_fullgraph_compile_costs_no_more_graphs_than_the_hooks(source, most):
    torch._dynamo.reset()
    config = KVLockConfig(kappa=2, window=3, tau=0.6, source=source)
    expected, _ = tiny.locked_call(tiny.pipeline(WanPipeline, layers=4), config, steps=4)
    pipe = tiny.pipeline(WanPipeline, layers=4)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    plain = tiny.call(pipe, steps=4)
    before = counters["stats"]["unique_graphs"]
    with tiny.attached(pipe, config, kernel="fused"):
        latents = tiny.call(pipe, steps=4)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - before <= most
    assert torch.equal(tiny.call(pipe, steps=4), plain)
    assert counters["stats"]["unique_graphs"] - before <= most
    torch._dynamo.reset()


class OtherProcessor(WanAttnProcessor):
    pass


@pytest.mark.parametrize("kernel", ["fused", "backend"])
@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("step", [0, 3], ids=["before-the-window", "inside-it"])
def test_a_processor_set_inside_the_block_is_named_and_stays(kernel, source, step):
    pipe = tiny.pipeline(WanPipeline)
    other = OtherProcessor()

    def replace(_pipe, now, timestep, kwargs):
        if now == step:
            pipe.transformer.blocks[1].attn1.set_processor(other)
        return kwargs

    message = r"blocks\[1\] has had its processor replaced by OtherProcessor"
    config = KVLockConfig(**WINDOW, source=source)
    with pytest.raises(ValueError, match=message), attach(pipe, config, kernel=kernel):
        tiny.call(pipe, steps=STEPS, callback_on_step_end=replace)
    assert pipe.transformer.blocks[1].attn1.processor is other
    assert vars(other) == {} == vars(pipe.transformer.blocks[0].attn1.processor)
    assert tiny.leftovers(pipe) == []


def test_an_unknown_kernel_is_refused_with_the_known_ones(pipes):
    with pytest.raises(ValueError, match=r"kernel='triton'.*'hooks', 'fused'"), attach(pipes["wan"], kernel="triton"):
        pass


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda attn: attn.set_processor(OtherProcessor()), "its processor is OtherProcessor, wanted WanAttnProcessor"),
        (lambda attn: setattr(attn, "norm_k", nn.RMSNorm(12)), r"norm_k is RMSNorm\(\(12,\).*over 24"),
        (lambda attn: setattr(attn, "norm_q", nn.LayerNorm(24)), "norm_q is LayerNorm"),
        (lambda attn: setattr(attn, "norm_q", nn.RMSNorm(24, elementwise_affine=False)), "norm_q is RMSNorm"),
        (lambda attn: setattr(attn.norm_q, "eps", None), "eps None"),
        (lambda attn: setattr(attn.norm_k, "eps", 1e-3), "eps 1e-06 and 0.001"),
        (lambda attn: HookRegistry.check_if_exists_or_initialize(attn.norm_k), "norm_k has hooks"),
        (lambda attn: attn.norm_q.register_forward_hook(print), "norm_q has hooks"),
        (lambda attn: setattr(attn.processor, "_parallel_config", object()), "split over several devices"),
    ],
    ids=["processor", "per-head-norm", "layer-norm", "no-weight", "no-eps", "two-eps", "offload", "hook", "parallel"],
)
def test_what_the_fused_pass_cannot_serve_is_refused_with_the_reason(change, reason):
    pipe = tiny.pipeline(WanPipeline)
    change(pipe.transformer.blocks[1].attn1)
    with pytest.raises(ValueError, match=r'kernel="fused" does not fit blocks\[1\].*' + reason), attach(pipe):
        pass
    assert all("kvlock" not in type(b.attn1.processor).__module__ for b in pipe.transformer.blocks)
    assert [name for name in tiny.leftovers(pipe) if "norm_q hook" not in name] == []


@pytest.mark.parametrize("given", ["another sequence", "no angles"])
def test_a_call_that_is_not_self_attention_with_rope_is_refused_by_name(pipes, given):
    pipe = pipes["wan"]
    attention = pipe.transformer.blocks[1].attn1
    hidden, angles = torch.zeros(1, tiny.TOKENS, 24), (torch.ones(1, tiny.TOKENS, 1, 12),) * 2
    layers = FusedLayers(LockState(torch.tensor([0]).int(), tiny.TOKENS))
    layers.install(locked_attentions(pipe.transformer, KVLockConfig()))
    try:
        layers.record()
        with pytest.raises(ValueError, match=r"blocks\[1\] is not called as self-attention with RoPE"):
            if given == "no angles":
                attention(hidden)
            else:
                attention(hidden, encoder_hidden_states=hidden, rotary_emb=angles)
    finally:
        layers.remove()


def test_a_mask_of_another_size_is_refused_by_name(pipes):
    pipe = pipes["wan"]
    layers = FusedLayers(LockState(torch.tensor([0]).int(), 7))
    layers.install(locked_attentions(pipe.transformer, KVLockConfig()))
    try:
        layers.record()
        with pytest.raises(ValueError, match=rf"\[0\] has {tiny.TOKENS} tokens, not 7; the mask was made for another"):
            tiny.call(pipe, steps=1)
    finally:
        layers.remove()
