"""An independent hand-written loop and an attached pipeline arrive at the same latents."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from oracle import Edit, Recipe, Result, edit
from PIL import Image

import kvlock
from kvlock import KVLockConfig, Masks

STEPS, TAU = 6, 0.6
AMID = {"tau": 0.085}  # among the variances of the runs of Wan below: a partial alpha and a boosted omega both occur
KINDS = {"wan": WanPipeline, "vace": WanVACEPipeline, "v2v": WanVideoToVideoPipeline}
WINDOW = {"kappa": 4, "window": 3, "tau": TAU}
BASE = Recipe(first_locked=2, window=3, tau=TAU)

# The same edit in the words of the package and in the oracle's own.
SETTINGS = {
    "default": ({}, {}),
    "full-lock": ({"fusion": "full"}, {"ratio": 1.0}),
    "fixed-0.5": ({"fusion": 0.5}, {"ratio": 0.5}),
    "fixed-0.5-on-every-step": ({"fusion": 0.5, "kappa": 1.0}, {"ratio": 0.5, "first_locked": 0}),
    "global-detection": ({"variance": "global"}, {"measure": "everywhere"}),
    "background-guidance-1": ({"background_guidance": 1.0}, {"outside": 1.0}),
    "x0-of-cond": ({"x0": "cond"}, {"from_branch": "cond"}),
    "layer-1-only": ({"layers": (1,)}, {"blocks": (1,)}),
    "cond-branch-only": ({"branches": "cond"}, {"branches": ("cond",)}),
    "uncond-branch-only": ({"branches": "uncond"}, {"branches": ("uncond",)}),
    "kappa-sigma": ({"kappa": None, "kappa_sigma": 0.7, "tau": TAU}, {"first_locked": None, "tau": TAU}),
    "last-two-steps": ({"kappa": 2, "fusion": 0.5}, {"first_locked": 4, "ratio": 0.5}),
    "zero-init": ({"zero_init_steps": 1}, {"silent_steps": 1}),
    "no-s-star": ({"optimized_scale": False}, {"s_star": False}),
    "no-dynamic-guidance": ({"dynamic_guidance": False}, {"follow": False}),
    "boost-1.2": ({"boost": 1.2}, {"boost": 1.2}),
    "lock-alone": ({"optimized_scale": False, "dynamic_guidance": False}, {"s_star": False, "follow": False}),
}


@pytest.fixture(scope="module")
def pipes():
    return {(name, s): tiny.pipeline(kind, s) for name, kind in KINDS.items() for s in ("euler", "unipc")}


def job(masks: Masks, *, batch: int = 1, **changes) -> Edit:
    frames = masks.latent.shape[2]
    start = tiny.rand(batch, 16, frames, 12, 12, seed=11)
    cond, uncond = (tiny.PROMPT[name] for name in ("prompt_embeds", "negative_prompt_embeds"))
    found = Edit(
        start=start,
        source=tiny.rand(1, 16, frames, 12, 12, seed=5),
        cond=cond + 0.1 * tiny.rand(batch, 1, 1, seed=12),
        uncond=uncond.expand(batch, -1, -1),
        source_prompt=tiny.SOURCE_PROMPT,
        rows=masks.index,
        inside=masks.latent > 0,
        measured=masks.weight > 0,
        everywhere=masks.global_weight > 0,
    )
    return replace(found, **changes)


def attached(pipe, work: Edit, masks: Masks, config: KVLockConfig, **extra) -> tuple[torch.Tensor, list[dict]]:
    with kvlock.attach(
        pipe, work.source, masks, config=config, source_prompt_embeds=work.source_prompt
    ) as session:
        latents = tiny.call(
            pipe,
            steps=STEPS,
            latents=work.start,
            prompt_embeds=work.cond,
            **({"negative_prompt_embeds": work.uncond} | extra),
        )
    tiny.assert_locked(session.trace.rows(), config)
    return latents, session.trace.rows()


class Seen(Exception):
    pass


def control_of(pipe, **extra) -> dict:
    """The control latents a VACE pipeline hands to its transformer."""
    caught: dict = {}

    def catch(module, args, kwargs):
        caught.update({name: value for name, value in kwargs.items() if name.startswith("control")})
        raise Seen

    handle = pipe.transformer.register_forward_pre_hook(catch, with_kwargs=True)
    with contextlib.suppress(Seen):
        tiny.call(pipe, **extra)
    handle.remove()
    return caught


def assert_agree(result: Result, latents: torch.Tensor, trace: list[dict]) -> None:
    torch.testing.assert_close(latents, result.latents, rtol=1e-5, atol=1e-5)
    assert [row["in_window"] for row in trace] == result.locked
    locked = torch.tensor(result.locked)[:, None]
    wanted = {
        "fusion_ratio": torch.stack(result.alpha) * locked,
        "guidance_scale": torch.stack(result.omega),
        "s_star": torch.stack(result.s_star),
    }
    for name, values in wanted.items():
        found = torch.tensor([row[name] for row in trace])
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize("name", SETTINGS)
def test_wan_agrees_with_two_passes_written_by_hand(pipes, name, schedule):
    ours, theirs = SETTINGS[name]
    pipe, config = pipes["wan", schedule], KVLockConfig(**(WINDOW | AMID | ours))
    masks = tiny.masks(pipe)
    work = job(masks)
    latents, trace = attached(pipe, work, masks, config)
    recipe = replace(BASE, **(AMID | theirs))
    if recipe.first_locked is None:
        pipe.scheduler.set_timesteps(STEPS)
        recipe.first_locked = next(k for k, sigma in enumerate(pipe.scheduler.sigmas) if sigma <= 0.7)
        assert recipe.first_locked > 2
    result = edit([pipe.transformer], pipe.scheduler, STEPS, work, recipe)
    assert_agree(result, latents, trace)
    if name in ("default", "full-lock", "no-s-star"):
        assert any(row["guidance_scale"][0] > 5 for row in trace)
    plain = tiny.call(pipe, steps=STEPS, latents=work.start, prompt_embeds=work.cond)
    assert (latents - plain).abs().max() > 0.1


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"control_blocks": True}, {"control": True}),
        ({"fusion": 0.5, "layers": (1,)}, {"ratio": 0.5, "blocks": (1,)}),
    ],
    ids=["default", "control-blocks", "fixed-0.5-in-layer-1"],
)
def test_vace_agrees_with_two_passes_written_by_hand(pipes, schedule, ours, theirs):
    pipe, config = pipes["vace", schedule], KVLockConfig(**(WINDOW | ours))
    masks = tiny.masks(pipe)
    work = job(masks, known=control_of(pipe))
    latents, trace = attached(pipe, work, masks, config)
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, replace(BASE, **theirs)), latents, trace)


@pytest.mark.parametrize("outside", [None, 1.0], ids=["guided-alike", "background-guidance-1"])
def test_vace_with_a_reference_image_agrees_with_two_passes_written_by_hand(pipes, outside):
    pipe = pipes["vace", "unipc"]
    image = {"reference_images": [Image.new("RGB", (tiny.SIZE, tiny.SIZE), (200, 30, 30))]}
    masks = tiny.masks(pipe, reference_frames=1)
    work = job(masks, known=control_of(pipe, **image))
    assert work.start.shape[2] == tiny.LATENT[1] + 1
    latents, trace = attached(pipe, work, masks, KVLockConfig(**WINDOW, background_guidance=outside), **image)
    recipe = replace(BASE, outside=outside)
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, recipe), latents, trace)


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize("ratio", [None, 0.5], ids=["default", "fixed-0.5"])
def test_video_to_video_recovers_its_noise_and_agrees_with_two_passes_written_by_hand(pipes, schedule, ratio):
    pipe = pipes["v2v", schedule]
    masks = tiny.masks(pipe)
    work = job(masks, starts_from_video=True, first_step=2)
    config = KVLockConfig(**WINDOW, fusion="variance" if ratio is None else ratio)
    latents, trace = attached(pipe, work, masks, config, video=None, strength=0.7)
    assert len(trace) == STEPS - 2
    recipe = replace(BASE, ratio=ratio, first_locked=4 if ratio is None else 2)
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, recipe), latents, trace)


def test_without_an_unconditional_branch_the_fusion_still_agrees(pipes):
    pipe = pipes["wan", "unipc"]
    masks = tiny.masks(pipe)
    work = job(masks, uncond=None, omega=(1.0,))
    with pytest.warns(UserWarning, match="no unconditional branch"):
        latents, trace = attached(
            pipe, work, masks, KVLockConfig(**WINDOW), guidance_scale=1.0, negative_prompt_embeds=None
        )
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, BASE), latents, trace)


@pytest.mark.parametrize("sources", [1, 2])
def test_two_samples_of_one_call_are_each_steered_by_their_own_variance(pipes, sources):
    pipe = pipes["wan", "euler"]
    masks = tiny.masks(pipe)
    work = job(masks, batch=2, source=tiny.rand(sources, *tiny.LATENT, seed=5))
    latents, trace = attached(pipe, work, masks, KVLockConfig(**WINDOW))
    assert_agree(edit([pipe.transformer], pipe.scheduler, STEPS, work, BASE), latents, trace)
    assert trace[-1]["fusion_ratio"][0] != trace[-1]["fusion_ratio"][1]


def test_two_experts_have_a_window_and_a_guidance_scale_each():
    pipe = tiny.pipeline(WanPipeline, "euler")
    pipe.register_modules(transformer_2=tiny.transformer(seed=9))
    pipe.register_to_config(boundary_ratio=0.85)
    masks = tiny.masks(pipe)
    work = job(masks, omega=(5.0, 3.0), switch=2)
    experts = [pipe.transformer, pipe.transformer_2]
    config = KVLockConfig(**(WINDOW | {"kappa": 1.0}))
    latents, trace = attached(pipe, work, masks, config, guidance_scale_2=3.0)
    assert sum(row["timestep"] >= 850 for row in trace) == work.switch
    assert_agree(edit(experts, pipe.scheduler, STEPS, work, BASE), latents, trace)
    assert [row["guidance_scale"][0] for row in trace][:4] == [5.0, 5.0, 3.0, 3.0]
    assert [row["fusion_ratio"][0] for row in trace][:4] == [0.0] * 4


@pytest.mark.parametrize("kind, batch", [("wan", 1), ("wan", 2), ("vace", 1)])
def test_the_source_beside_the_edit_gives_what_the_stored_source_gives(pipes, kind, batch):
    pipe = pipes[kind, "unipc"]
    masks = tiny.masks(pipe)
    work = job(masks, batch=batch, source=tiny.rand(batch, *tiny.LATENT, seed=5))
    config = KVLockConfig(**WINDOW)
    stored, _ = attached(pipe, work, masks, config)
    beside, _ = attached(pipe, work, masks, replace(config, source="batch"))
    torch.testing.assert_close(beside, stored, rtol=1e-5, atol=1e-5)
