"""Taps, root hooks and the scheduler's shim: each fires as often as it should, refuses by name and leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVACEPipeline,
)
from diffusers.hooks import apply_first_block_cache
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

import kvlock
from kvlock import KVLockConfig, preset
from kvlock.adapters.taps import Taps
from kvlock.locked_layers import LayerKey, LockState

STEPS = 5
LOCK = {"kappa": 3, "window": 3, "tau": 0.6}


def attach(pipe, config: KVLockConfig | None = None, **changes):
    arguments = {"config": config, "source_prompt_embeds": tiny.SOURCE_PROMPT} | changes
    source = arguments.pop("source", tiny.source_latents())
    masks = arguments.pop("masks", None)
    return kvlock.attach(pipe, source, tiny.masks(pipe) if masks is None else masks, **arguments)


@pytest.fixture(scope="module")
def wan():
    return tiny.pipeline(WanPipeline, "euler", layers=3)


@pytest.fixture(scope="module")
def vace():
    return tiny.pipeline(WanVACEPipeline, "euler")


@pytest.mark.parametrize(
    "settings, blocks, branches",
    [
        ({}, (0, 1, 2), 2),
        ({"layers": (2, 0)}, (0, 2), 2),
        ({"branches": "cond"}, (0, 1, 2), 1),
        ({"branches": "uncond"}, (0, 1, 2), 1),
        ({"fusion": 0.5, "kappa": 1.0}, (0, 1, 2), 2),
    ],
    ids=["all", "layers-2-0", "cond", "uncond", "every-step"],
)
def test_every_expected_tap_lerps_once_a_call_and_no_other_does(wan, settings, blocks, branches):
    config = KVLockConfig(**(LOCK | settings))
    locked_steps = STEPS if config.kappa == 1.0 else 3
    with tiny.Lerps(wan) as lerps:
        _, trace = tiny.locked_call(wan, config, steps=STEPS)
    expected = {("blocks", block, tensor): branches * locked_steps for block in blocks for tensor in "kv"}
    assert dict(lerps.counts) == expected
    assert sum(row["locked"] for row in trace) == locked_steps
    with tiny.Lerps(wan) as beside:  # who lerped cannot be told; that every tap did, the session asserts itself
        tiny.locked_call(wan, dataclasses.replace(config, source="batch"), steps=STEPS)
    assert dict(beside.counts) == {None: sum(expected.values())}


@pytest.mark.parametrize("control", [False, True])
def test_control_blocks_are_tapped_only_when_asked_for(vace, control):
    with tiny.Lerps(vace) as lerps:
        tiny.locked_call(vace, KVLockConfig(**LOCK, control_blocks=control), steps=STEPS)
    stacks = ("blocks", "vace_blocks") if control else ("blocks",)
    assert dict(lerps.counts) == dict.fromkeys(itertools.product(stacks, (0, 1), "kv"), 2 * 3)


def test_the_trace_counts_the_forwards_and_the_bytes_of_background_rows(wan):
    _, trace = tiny.locked_call(wan, KVLockConfig(**LOCK), steps=STEPS)
    rows, dim, layers = tiny.masks(wan).background_rows, 24, 3
    assert [row["forwards"] for row in trace] == [2, 2, 3, 3, 3]
    assert [row["source_bytes"] for row in trace] == [0, 0] + [rows * dim * layers * 2 * 4] * 3
    _, trace = tiny.locked_call(wan, KVLockConfig(**LOCK, source="batch"), steps=STEPS)
    assert [row["forwards"] for row in trace] == [2, 2, 4, 4, 4]
    assert [row["source_bytes"] for row in trace] == [0] * 5


def test_nothing_is_left_behind_after_the_block(wan):
    before = tiny.call(wan, steps=2)
    with tiny.attached(wan, KVLockConfig(**LOCK)):
        assert tiny.leftovers(wan)
        tiny.call(wan, steps=STEPS)
    assert tiny.leftovers(wan) == []
    assert torch.equal(tiny.call(wan, steps=2), before)


def test_a_key_with_heads_before_tokens_is_lerped_along_its_tokens():
    rows, tokens = torch.tensor([1, 4], dtype=torch.int32), 6
    taps = Taps(LockState(rows, tokens))
    for shape, axis in (((1, tokens, 8), 1), ((1, tokens, 2, 4), 1), ((1, 2, tokens, 4), 2)):
        module = nn.Identity()
        taps.install([(LayerKey("blocks", 0, "k"), module)])
        source, new = torch.zeros(shape), torch.ones(shape)
        taps.record()
        module(source)
        taps.lerp(torch.tensor([0.25]))
        out = module(new.clone())
        other_axes = [a for a in range(len(shape)) if a != axis]
        torch.testing.assert_close(out.mean(other_axes), torch.tensor([1, 0.75, 1, 1, 0.75, 1]))
        taps.remove()
        assert type(module) is nn.Identity


def test_a_layer_without_the_masks_token_count_is_refused_by_name():
    taps = Taps(LockState(torch.tensor([0], dtype=torch.int32), 6))
    module = nn.Identity()
    taps.install([(LayerKey("blocks", 7, "v"), module)])
    taps.record()
    with pytest.raises(ValueError, match=r"blocks\[7\] gives v of shape \[1, 5, 8\].*6 tokens"):
        module(torch.zeros(1, 5, 8))


class ReadsTheWeights(WanAttnProcessor):
    """Makes values of the weights of the module that projects them, without calling it."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        v = F.linear(hidden_states, attn.to_v.weight, attn.to_v.bias)
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_layer_that_runs_past_its_tap_is_refused_by_name(source, when):
    pipe = tiny.pipeline(WanPipeline)
    change = lambda: pipe.transformer.blocks[1].attn1.set_processor(ReadsTheWeights())
    if when == "before":
        change()
    message = r"blocks\[1\] ran past the lock on its v: .*wanted diffusers' own processor"
    with pytest.raises(ValueError, match=message), attach(pipe, KVLockConfig(**LOCK, source=source)):
        if when == "inside":
            change()
        tiny.call(pipe, steps=STEPS)
    assert tiny.leftovers(pipe) == []


def test_projections_fused_inside_the_block_are_refused():
    pipe = tiny.pipeline(WanPipeline)
    with pytest.raises(ValueError, match="fused QKV projections"), attach(pipe):
        pipe.transformer.fuse_qkv_projections()
        tiny.call(pipe, steps=STEPS)


@pytest.mark.parametrize("kernel", ["hooks", "fused"])
def test_a_module_replaced_inside_the_block_is_refused_by_name(kernel):
    pipe = tiny.pipeline(WanPipeline)
    block, another = pipe.transformer.blocks[1], tiny.transformer(seed=3).blocks[1]
    holder, name, tensor, other = {
        "hooks": (block.attn1, "to_v", "v", another.attn1.to_v),
        "fused": (block, "attn1", "k and v", another.attn1),
    }[kernel]
    message = rf"blocks\[1\] has had the module that gives {tensor} replaced by \w+ since attach"
    with pytest.raises(ValueError, match=message), attach(pipe, kernel=kernel):
        setattr(holder, name, other)
        tiny.call(pipe, steps=STEPS)


class Adapted(nn.Module):
    """What a LoRA makes of a projection: the old one inside a new module."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_projection_wrapped_before_attaching_is_tapped_with_its_adapter():
    pipe = tiny.pipeline(WanPipeline)
    torch.manual_seed(3)
    for block in pipe.transformer.blocks:
        block.attn1.to_v = Adapted(block.attn1.to_v)
    with tiny.attached(pipe, preset("fixed-0.5", kappa=1)):
        assert hasattr(pipe.transformer.blocks[0].attn1.to_v, "kvlock_tap")
        assert not hasattr(pipe.transformer.blocks[0].attn1.to_v.base, "kvlock_tap")
        with tiny.Lerps(pipe) as lerps:
            tiny.call(pipe, steps=2)
    assert lerps.counts["blocks", 0, "v"] == lerps.counts["blocks", 1, "v"] == 2
    assert tiny.leftovers(pipe) == []


def test_a_deep_copy_of_the_scheduler_works_on_its_own_state_inside_the_block(wan):
    config = KVLockConfig(**LOCK)
    expected, _ = tiny.locked_call(wan, config, steps=STEPS)
    original = wan.scheduler
    with tiny.attached(wan, config) as session:
        wan.scheduler = copy.deepcopy(original)
        assert wan.scheduler.step.__self__ is wan.scheduler
        assert wan.scheduler.kvlock_session is session
        copied = tiny.call(wan, steps=STEPS)
        wan.scheduler = original
        assert torch.equal(tiny.call(wan, steps=STEPS), expected)
    assert torch.equal(copied, expected)
    assert tiny.leftovers(wan) == []


REFUSALS = {
    "an-unknown-transformer": (
        lambda pipe: setattr(pipe, "transformer", MochiTransformer3DModel(num_layers=1, num_attention_heads=1)),
        {},
        "transformer MochiTransformer3DModel is not supported; supported transformers: WanTransformer3DModel, Wan",
    ),
    "no-transformer": (lambda pipe: setattr(pipe, "transformer", None), {}, "WanPipeline has no transformer"),
    "one-module-twice": (
        lambda pipe: pipe.register_modules(transformer_2=pipe.transformer),
        {},
        "transformer and transformer_2 are one module",
    ),
    "masks-of-another-dilation": (
        None,
        {"config": KVLockConfig(dilate_tokens=0)},
        "masks were made with dilate_tokens=1, the config has 0",
    ),
    "an-unknown-scheduler": (
        lambda pipe: setattr(pipe, "scheduler", EulerDiscreteScheduler()),
        {},
        "unknown scheduler EulerDiscreteScheduler; supported schedulers: FlowMatchEuler",
    ),
    "a-block-cache": (
        lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig()),
        {},
        "WanTransformer3DModel has a block cache enabled",
    ),
    "a-block-cache-put-on-by-hand": (
        lambda pipe: apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig()),
        {},
        "WanTransformer3DModel has a block cache enabled",
    ),
    "fused-projections": (
        lambda pipe: pipe.transformer.fuse_qkv_projections(),
        {},
        r"fused QKV projections that bypass to_v; call unfuse_qkv_projections\(\)",
    ),
    "compilation-in-place": (
        lambda pipe: pipe.transformer.compile(backend="eager"),
        {},
        r"WanTransformer3DModel.compile\(\) in place",
    ),
    "double-precision": (
        lambda pipe: pipe.transformer.double(),
        {},
        "transformer WanTransformer3DModel has dtype torch.float64; wanted torch.float32, torch.bfloat16 or torch.flo",
    ),
    "a-layer-that-is-not-there": (
        None,
        {"config": KVLockConfig(layers=(0, 2))},
        "layers names block 2; WanTransformer3DModel has 2, numbered from 0",
    ),
    "control-blocks-of-wan": (
        None,
        {"config": KVLockConfig(control_blocks=True)},
        "control_blocks=True, but WanTransformer3DModel has no control blocks",
    ),
    "a-composite-in-pixels": (None, {"config": KVLockConfig(composite="pixel")}, "use KVLockPipeline"),
    "latents-of-another-type": (None, {"source": np.zeros((1, *tiny.LATENT))}, "source_latents is a ndarray; wanted"),
    "latents-of-whole-numbers": (None, {"source": torch.zeros(1, *tiny.LATENT).int()}, "tensor of torch.int32 on cpu"),
    "latents-without-values": (None, {"source": torch.zeros(1, *tiny.LATENT, device="meta")}, "torch.float32 on meta"),
    "latents-with-nan": (None, {"source": torch.full((1, *tiny.LATENT), torch.nan)}, "source_latents holds NaN"),
    "a-prompt-in-words": (None, {"source_prompt_embeds": "a cat"}, "source_prompt_embeds is a str; wanted a tensor"),
    "a-prompt-with-infinity": (None, {"source_prompt_embeds": tiny.SOURCE_PROMPT / 0}, "prompt_embeds holds NaN"),
    "masks-of-another-type": (None, {"masks": torch.zeros(5)}, "masks is a Tensor; wanted a kvlock.Masks"),
    "a-config-of-another-type": (None, {"config": "plain"}, "config is a str; wanted a kvlock.KVLockConfig"),
    "an-empty-dict-for-a-config": (None, {"config": {}}, "config is a dict; wanted a kvlock.KVLockConfig"),
    "no-source-prompt": (None, {"source_prompt_embeds": None}, "no text encoder; pass source_prompt_embeds"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_attach_refuses_by_name_and_leaves_nothing(name):
    change, arguments, message = REFUSALS[name]
    pipe = tiny.pipeline(WanPipeline)
    masks = tiny.masks(pipe)
    if change is not None:
        change(pipe)
    with pytest.raises(ValueError, match=message), attach(pipe, **({"masks": masks} | arguments)):
        pass
    if pipe.transformer is not None:
        assert [found for found in tiny.leftovers(pipe) if "cache" not in found.lower()] == []


def test_a_scheduler_whose_options_are_not_supported_is_refused_when_it_sets_its_timesteps(wan):
    ours = wan.scheduler
    wan.scheduler = UniPCMultistepScheduler()
    message = "UniPCMultistepScheduler with use_flow_sigmas=False is not supported"
    with pytest.raises(ValueError, match=message), attach(wan):
        tiny.call(wan, steps=2)
    assert tiny.leftovers(wan) == []
    wan.scheduler = ours


def test_attaching_twice_is_refused_and_leaves_the_first_intact(wan):
    config = KVLockConfig(**LOCK)
    expected, _ = tiny.locked_call(wan, config, steps=STEPS)
    with tiny.attached(wan, config):
        with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler\.\w+ is patched"), attach(wan, config):
            pass
        assert torch.equal(tiny.call(wan, steps=STEPS), expected)
    assert tiny.leftovers(wan) == []


def test_a_second_pipeline_around_an_attached_transformer_is_refused(wan):
    config = KVLockConfig(**LOCK)
    expected, _ = tiny.locked_call(wan, config, steps=STEPS)
    second = WanPipeline(**(wan.components | {"scheduler": tiny.scheduler("unipc")}))
    with tiny.attached(wan, config):
        with pytest.raises(ValueError, match="WanTransformer3DModel is attached already"), attach(second, config):
            pass
        assert "step" not in vars(second.scheduler)
        assert torch.equal(tiny.call(wan, steps=STEPS), expected)
    assert tiny.leftovers(wan) == []
