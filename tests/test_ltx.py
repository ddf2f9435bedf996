"""LTX: tokens in place of videos, and both guidance branches in one call of the transformer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import tiny_ltx
import torch
from diffusers import LTXPipeline
from test_oracle import assert_agree

import kvlock
from kvlock import KVLockConfig, preset
from kvlock.adapters.backend_registry import default_backend, register

STEPS = 6
WINDOW: dict[str, Any] = {"kappa": 4, "window": 3, "tau": 0.5}
BASE = oracle.Recipe(first_locked=2, window=3, tau=0.5)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "full-lock": ({"fusion": "full"}, {"ratio": 1.0}),
    "fixed-0.5": ({"fusion": 0.5}, {"ratio": 0.5}),
    "cond-branch-only": ({"branches": "cond"}, {"branches": ("cond",)}),
    "full-lock-of-uncond-branch": ({"branches": "uncond", "fusion": "full"}, {"branches": ("uncond",), "ratio": 1.0}),
    "background-guidance-1": ({"background_guidance": 1.0}, {"outside": 1.0}),
    "lock-alone": ({"optimized_scale": False, "dynamic_guidance": False}, {"s_star": False, "follow": False}),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_ltx.pipeline()


class MixingProcessor(oracle.MixingProcessor):
    """LTX's self-attention, which rotates pairs of channels before they are heads."""

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        cos, sin = image_rotary_emb

        def turned(y):
            a, b = y[..., 0::2], y[..., 1::2]
            c, s = cos[..., 0::2], sin[..., 0::2]
            return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(2)

        heads = lambda y: y.unflatten(2, (attn.heads, -1))
        q, k = turned(attn.norm_q(attn.to_q(x))), turned(attn.norm_k(attn.to_k(x)))
        return self.attend(attn, heads(q), heads(k), heads(attn.to_v(x)))


class OneBranch:
    """The transformer as the oracle calls one: latents [1, C, T, h, w], one prompt."""

    def __init__(self, model: Any, masks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.blocks = model.transformer_blocks
        self.model = model
        self.masks = masks

    def __call__(self, x, timestep, prompt, return_dict):
        (mask,) = (mask for known, mask in self.masks if known.shape == prompt.shape and torch.equal(known, prompt))
        out = self.model(
            hidden_states=tiny_ltx.as_tokens(x),
            encoder_hidden_states=prompt,
            timestep=timestep,
            encoder_attention_mask=mask,
            num_frames=3,
            height=6,
            width=6,
            rope_interpolation_scale=(8 / 25, 32, 32),
            return_dict=False,
        )
        return (tiny_ltx.as_video(out[0]),)


def by_hand(pipe: Any, start: torch.Tensor, recipe: oracle.Recipe, guidance: float) -> oracle.Result:
    masks, given = tiny_ltx.masks(pipe), tiny_ltx.PROMPT
    prompts = [(given[f"{of}prompt_embeds"], given[f"{of}prompt_attention_mask"]) for of in ("", "negative_")]
    job = oracle.Edit(
        start=start,
        source=tiny_ltx.source_latents(),
        cond=prompts[0][0],
        uncond=prompts[1][0] if guidance > 1 else None,
        source_prompt=tiny_ltx.SOURCE_PROMPT,
        rows=masks.index,
        inside=masks.latent > 0,
        measured=masks.weight > 0,
        everywhere=masks.global_weight > 0,
        omega=(guidance,),
    )
    scheduler = pipe.scheduler
    sigmas, mu = np.linspace(1.0, 1 / STEPS, STEPS), 0.95 + (108 - 64) * (2.05 - 0.95) / (256 - 64)
    table = SimpleNamespace(
        set_timesteps=lambda steps: scheduler.set_timesteps(sigmas=sigmas, mu=mu),
        set_begin_index=scheduler.set_begin_index,
        step=scheduler.step,
    )
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    table.timesteps, table.sigmas = scheduler.timesteps, scheduler.sigmas
    known = [*prompts, (tiny_ltx.SOURCE_PROMPT, torch.ones(1, 5))]
    return oracle.edit([OneBranch(pipe.transformer, known)], table, STEPS, job, recipe, MixingProcessor)


def edited(pipe: Any, config: KVLockConfig, *, kernel: str = "hooks", **extra: Any) -> tuple[torch.Tensor, list[dict]]:
    masks = tiny_ltx.masks(pipe)
    source, prompt = tiny_ltx.source_latents(), tiny_ltx.SOURCE_PROMPT
    with kvlock.attach(pipe, source, masks, config=config, source_prompt_embeds=prompt, kernel=kernel) as session:
        latents = tiny_ltx.call(pipe, steps=STEPS, **extra)
    tiny.assert_locked(session.trace.rows(), config)
    assert tiny.leftovers(pipe) == []
    return latents, session.trace.rows()


@pytest.mark.parametrize(
    "name, guidance", [*((name, 5.0) for name in SETTINGS), *((name, 1.0) for name in ("default", "cond-branch-only"))]
)
def test_ltx_agrees_with_two_passes_written_by_hand(pipe, name, guidance):
    ours, theirs = SETTINGS[name]
    start = tiny.rand(1, 8, *tiny_ltx.GRID, seed=11)
    config = KVLockConfig(**(WINDOW | ours))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "guidance_scale=1 means no unconditional branch")
        latents, trace = edited(pipe, config, latents=tiny_ltx.as_tokens(start), guidance_scale=guidance)
    result = by_hand(pipe, start, replace(BASE, **theirs), guidance)
    if guidance == 1:  # the trace says 1 where nothing is guided
        result.omega = [torch.ones(1)] * STEPS
    assert_agree(result, tiny_ltx.as_video(latents), trace)
    assert [row["forwards"] for row in trace] == [(2 if guidance > 1 else 1) + row["locked"] for row in trace]


OTHER_WAYS = {
    "backend": ({}, "backend"),
    "backend-of-a-full-lock": ({"fusion": "full"}, "backend"),
    "backend-of-a-full-lock-of-one-branch": ({"fusion": "full", "branches": "cond"}, "backend"),
    "source-beside": ({"source": "batch"}, "hooks"),
    "source-beside-by-the-backend": ({"source": "batch", "fusion": "full"}, "backend"),
    "source-beside-of-one-branch": ({"source": "batch", "branches": "uncond"}, "hooks"),
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_every_way_gives_the_edit_of_stored_rows_and_hooks(pipe, name):
    changes, kernel = OTHER_WAYS[name]
    config = KVLockConfig(**(WINDOW | changes))
    with tiny.Operators() as operators:
        found, trace = edited(pipe, config, kernel=kernel)
    expected, wanted = edited(pipe, replace(config, source="store"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [row["forwards"] for row in trace] == [row["forwards"] for row in wanted]
    assert (operators.locks == {}) == (kernel == "backend" and name.endswith(("full-lock", "by-the-backend")))


@pytest.mark.parametrize("step", [None, 2], ids=["before-the-run", "inside-the-window"])
def test_the_backend_goes_round_set_run_restore(pipe, step):
    config, masks = KVLockConfig(**WINDOW), tiny_ltx.masks(pipe)
    expected, _ = edited(pipe, config)
    plain = tiny_ltx.call(pipe, steps=STEPS)
    before = default_backend()

    def choose(_pipe, now, timestep, kwargs):
        if now == step:
            pipe.transformer.set_attention_backend("kvlock")
        return kwargs

    source, prompt = tiny_ltx.source_latents(), tiny_ltx.SOURCE_PROMPT
    for _ in range(2):
        with (
            kvlock.attach(pipe, source, masks, config=config, source_prompt_embeds=prompt),
            tiny.Operators() as operators,
        ):
            if step is None:
                pipe.transformer.set_attention_backend("kvlock")
            found = tiny_ltx.call(pipe, steps=STEPS, callback_on_step_end=choose)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert operators.locks["kv_lerp_attention_"] == 2 * (4 if step is None else 3)
        assert default_backend() is before and tiny.leftovers(pipe) == []
        assert all(vars(block.attn1.processor) == {} for block in pipe.transformer.transformer_blocks)
        assert torch.equal(tiny_ltx.call(pipe, steps=STEPS), plain)


def test_a_guidance_scale_that_a_callback_changes_is_followed_as_the_pipeline_follows_it(pipe):
    def change(_pipe, step, timestep, kwargs):
        pipe._guidance_scale = {0: 2.0, 3: 3.0}.get(step, pipe.guidance_scale)
        return kwargs

    trace_only = preset("plain")
    plain = tiny_ltx.call(pipe, steps=STEPS, callback_on_step_end=change)
    found, rows = edited(pipe, trace_only, callback_on_step_end=change)
    assert torch.equal(found, plain)
    assert [row["guidance_scale"] for row in rows] == [[5.0], [2.0], [2.0], [2.0], [3.0], [3.0]]
    boosted = KVLockConfig(fusion="off", optimized_scale=False, **WINDOW)
    _, rows = edited(pipe, boosted, callback_on_step_end=change)
    for row, scale in zip(rows[1:], (2, 2, 2, 3, 3), strict=True):
        assert scale * (1 - 1e-6) <= row["guidance_scale"][0] <= 2 * scale * (1 + 1e-6)
    assert rows[4]["guidance_scale"][0] == pytest.approx(1.5 * 2 * min(max(rows[3]["variance_masked"][0] / 0.5, 1), 2))


def test_an_exception_inside_leaves_nothing(pipe):
    def fail(_pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    plain = tiny_ltx.call(pipe, steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        edited(pipe, KVLockConfig(kappa=1.0, fusion=0.5), kernel="backend", callback_on_step_end=fail)
    assert tiny.leftovers(pipe) == []
    assert torch.equal(tiny_ltx.call(pipe, steps=STEPS), plain)


def test_it_survives_regional_fullgraph_compile(pipe):
    register()
    torch._dynamo.reset()
    config = KVLockConfig(**WINDOW)
    expected, _ = edited(pipe, config)
    compiled = tiny_ltx.pipeline()
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(edited(compiled, config, kernel="backend")[0], expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_background_of_a_latent_composite_is_the_source(pipe):
    masks, source = tiny_ltx.masks(pipe), tiny_ltx.source_latents()
    found = tiny_ltx.as_video(edited(pipe, KVLockConfig(composite="latent", **WINDOW))[0])
    outside = (masks.latent <= 0).expand_as(source)
    assert torch.equal(found[outside], source[outside])
    assert not torch.isclose(found, source)[~outside].all()


@pytest.mark.parametrize("change", [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}], ids=repr)
def test_an_edit_that_changes_nothing_is_the_pipeline_to_the_last_bit(pipe, change):
    plain = tiny_ltx.call(pipe, **change)
    assert torch.equal(edited(pipe, preset("plain"), **change)[0], plain)
    ratio_0 = KVLockConfig(fusion=0.0, optimized_scale=False, dynamic_guidance=False)
    assert torch.equal(edited(pipe, ratio_0, **change)[0], plain)
    assert torch.equal(tiny_ltx.call(pipe, **change), plain)


def test_an_edit_from_a_recording_is_the_edit(pipe, tmp_path):
    config, masks = KVLockConfig(**WINDOW), tiny_ltx.masks(pipe)
    source = {"source_prompt_embeds": tiny_ltx.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "source", tiny_ltx.source_latents(), masks, config=config, **source) as session:
        tiny_ltx.call(pipe, steps=STEPS)
    assert [row["forwards"] for row in session.trace.rows()] == [0, 0, 1, 1, 1, 1]
    recording = kvlock.Recording(tmp_path / "source")
    with kvlock.attach(pipe, tiny_ltx.source_latents(), masks, config=config, recording=recording) as session:
        found = tiny_ltx.call(pipe, steps=STEPS)
    assert [row["forwards"] for row in session.trace.rows()] == [2] * STEPS
    assert torch.equal(found, edited(pipe, config)[0])


def test_latents_stay_in_the_precision_of_the_pipeline():
    half = tiny_ltx.pipeline()
    half.transformer.to(torch.bfloat16)
    embeds = {name: value.bfloat16() for name, value in tiny_ltx.PROMPT.items() if name.endswith("embeds")}
    plain = tiny_ltx.call(half, **embeds)
    found, _ = edited(half, KVLockConfig(**WINDOW), **embeds)
    assert found.dtype == plain.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


REFUSALS = {
    "two-videos": ({}, {"num_videos_per_prompt": 2}, "2 videos in a call .* both guidance branches; wanted one video"),
    "a-rescale": ({}, {"guidance_rescale": 0.7}, "guidance_rescale=0.7 rescales .* which these settings replace"),
    "a-rescale-that-is-measured": (
        {"optimized_scale": False, "dynamic_guidance": False},
        {"guidance_rescale": 0.7},
        "guidance_rescale=0.7 rescales .* which these settings measure without it",
    ),
    "as-many-tokens-of-another-grid": (
        {},
        {"height": 128, "width": 288},
        r"masks were made for latents of \[T, h, w\] = \[3, 6, 6\]; the edit's have \[3, 4, 9\]",
    ),
    "another-size": ({}, {"height": 224}, r"\[T, h, w\] = \[3, 6, 6\]; the edit's have \[3, 7, 6\]"),
    "fused": ({"kernel": "fused"}, {}, 'kernel="fused" does not fit transformer_blocks\\[0\\]'),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(pipe, name):
    options, change, message = REFUSALS[name]
    kernel = options.get("kernel", "hooks")
    settings = {key: value for key, value in options.items() if key != "kernel"}
    with pytest.raises(ValueError, match=message):
        edited(pipe, KVLockConfig(**WINDOW, **settings), kernel=kernel, **change)
    assert tiny.leftovers(pipe) == []


def test_a_patch_of_several_latents_is_refused():
    other = tiny_ltx.pipeline()
    masks = tiny_ltx.masks(other)
    other.transformer.register_to_config(patch_size=2)
    with (
        pytest.raises(ValueError, match=r"has patches of \(1, 2\) latents .*; wanted a token for each latent"),
        kvlock.attach(other, tiny_ltx.source_latents(), masks, source_prompt_embeds=tiny_ltx.SOURCE_PROMPT),
    ):
        pass


@pytest.mark.parametrize("called_before", [False, True])
def test_another_pipeline_of_the_same_parts_called_inside_the_block_is_refused(called_before):
    pipe = tiny_ltx.pipeline()
    another = LTXPipeline(**pipe.components)
    another.set_progress_bar_config(disable=True)
    if called_before:
        tiny_ltx.call(pipe, steps=2)
    with (
        pytest.raises(ValueError, match="while LTXPipeline, which is attached, does not run"),
        kvlock.attach(
            pipe, tiny_ltx.source_latents(), tiny_ltx.masks(pipe), source_prompt_embeds=tiny_ltx.SOURCE_PROMPT
        ),
    ):
        tiny_ltx.call(another, steps=STEPS)
