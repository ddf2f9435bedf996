"""kernel="backend" under torch.compile: no more graphs than the hooks, and the results of eager execution."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch._dynamo.utils import counters

from kvlock import KVLockConfig
from kvlock.adapters.backend_registry import register

STEPS = 4


@pytest.fixture(autouse=True)
def no_graphs():
    register()  # the dispatcher's table grows once in a process, and graphs made before that are made again
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "kind, source, most, fusion",
    [(WanPipeline, "store", 2, "full"), (WanPipeline, "batch", 1, "variance"), (WanVACEPipeline, "store", 2, 0.5)],
)
def test_regional_fullgraph_compile_costs_no_more_graphs_than_the_hooks(kind, source, most, fusion):
    config = KVLockConfig(kappa=2, window=3, tau=0.6, source=source, fusion=fusion)
    expected, _ = tiny.locked_call(tiny.pipeline(kind, layers=4), config, steps=STEPS)
    pipe = tiny.pipeline(kind, layers=4)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    plain = tiny.call(pipe, steps=STEPS)
    before = counters["stats"]["unique_graphs"]
    with tiny.attached(pipe, config, kernel="backend"):
        latents = tiny.call(pipe, steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - before <= most
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    again, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    assert torch.equal(again, latents)
    assert counters["stats"]["unique_graphs"] - before <= most


def test_a_transformer_compiled_as_a_whole_gives_the_same_latents():
    pipe, config = tiny.pipeline(WanPipeline), KVLockConfig(kappa=2, window=3, tau=0.6)
    plain = tiny.call(pipe, steps=STEPS)
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for _ in range(2):  # the second time every graph is there already
        torch.testing.assert_close(tiny.call(pipe, steps=STEPS), plain, rtol=1e-5, atol=1e-5)
        with tiny.attached(pipe, config):
            pipe.transformer.set_attention_backend("kvlock")
            latents = tiny.call(pipe, steps=STEPS)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in pipe.transformer._orig_mod.blocks)
