"""Offloading, switched on before or after attaching, changes where weights are and nothing else."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline

import kvlock
from kvlock import KVLockConfig

STEPS = 4
MIXING = KVLockConfig(kappa=2, window=3, tau=0.6)
CPU = torch.device("cpu")

OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group-by-block": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "group-by-leaf": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    ),
}


@pytest.fixture(scope="module")
def expected():
    """Final latents of an attached run without offload, and of a plain one, for each kind of pipeline."""
    pipes = {kind: tiny.pipeline(kind) for kind in (WanPipeline, WanVACEPipeline)}
    runs = {kind: tiny.locked_call(pipe, MIXING, steps=STEPS) for kind, pipe in pipes.items()}
    return {kind: (latents, tiny.call(pipes[kind], steps=STEPS)) for kind, (latents, _) in runs.items()}


CASES = [*((WanPipeline, name) for name in OFFLOADS), (WanVACEPipeline, "model")]


@pytest.mark.parametrize("kind, name", CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_offload_before_attaching_gives_the_same_latents_call_after_call(expected, kind, name):
    pipe = tiny.pipeline(kind)
    OFFLOADS[name](pipe)
    locked, plain = expected[kind]
    for _ in range(2):  # a pipeline puts its model hooks on anew at the end of every call
        latents, _ = tiny.locked_call(pipe, MIXING, steps=STEPS)
        assert torch.equal(latents, locked)
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_inside_the_block_gives_the_same_latents_call_after_call(expected, name):
    pipe = tiny.pipeline(WanPipeline)
    locked, plain = expected[WanPipeline]
    with tiny.attached(pipe, MIXING):
        OFFLOADS[name](pipe)
        for _ in range(2):
            assert torch.equal(tiny.call(pipe, steps=STEPS), locked)
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_a_source_is_recorded_under_offload_and_the_pipeline_goes_on_as_before(expected, tmp_path, name, where):
    pipe = tiny.pipeline(WanPipeline)
    locked, plain = expected[WanPipeline]
    if where == "before":
        OFFLOADS[name](pipe)
    options = {"config": MIXING, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "source", tiny.source_latents(), tiny.masks(pipe), **options):
        if where == "inside":
            OFFLOADS[name](pipe)
        tiny.call(pipe, steps=STEPS)
    for _ in range(2):  # whoever wraps forward anew after a call
        assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    again = {"config": MIXING, "recording": kvlock.Recording(tmp_path / "source")}
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), **again):
        assert torch.equal(tiny.call(pipe, steps=STEPS), locked)
    assert tiny.leftovers(pipe) == []


def test_hooks_removed_inside_the_block_stay_removed(expected, tmp_path):
    pipe = tiny.pipeline(WanPipeline)
    pipe.enable_model_cpu_offload(device="cpu")
    options = {"config": MIXING, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "source", tiny.source_latents(), tiny.masks(pipe), **options):
        tiny.call(pipe, steps=STEPS)
        pipe.remove_all_hooks()
    for _ in range(2):
        assert torch.equal(tiny.call(pipe, steps=STEPS), expected[WanPipeline][1])
