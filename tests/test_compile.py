"""Compiled transformers: few graphs, none for a layer, a step or a run, and the results of eager execution."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline
from torch._dynamo.utils import counters

import kvlock
from kvlock import KVLockConfig, Masks, Store, attach, preset

LAYERS, STEPS = 12, 4
STORE = KVLockConfig(kappa=2, window=3, tau=0.6)
BATCH = KVLockConfig(kappa=2, window=3, tau=0.6, source="batch")


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager():
    """Final latents of the uncompiled pipeline: plain, and attached in both modes."""
    pipe = tiny.pipeline(WanPipeline, layers=LAYERS)
    runs = [tiny.locked_call(pipe, config, steps=STEPS) for config in (STORE, BATCH)]
    return tiny.call(pipe, steps=STEPS), runs[0][0], runs[1][0]


def compiled() -> WanPipeline:
    pipe = tiny.pipeline(WanPipeline, layers=LAYERS)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    return pipe


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def new_graphs(action) -> tuple[int, torch.Tensor]:
    before = graphs()
    result = action()
    return graphs() - before, result


def test_twelve_compiled_blocks_cost_two_graphs_more_in_store_mode_after_a_plain_run(eager):
    pipe = compiled()
    plain, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
    assert torch.equal(latents, eager[0])
    with tiny.attached(pipe, STORE):
        more, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
        torch.testing.assert_close(latents, eager[1], rtol=1e-5, atol=1e-5)
        again, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS + 1, seed=1))
    assert plain == 1
    assert more <= 2
    assert again == 0
    detached, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
    assert detached == 0
    assert torch.equal(latents, eager[0])
    attached_anew, (latents, _) = new_graphs(lambda: tiny.locked_call(pipe, STORE, steps=STEPS))
    assert attached_anew == 0
    torch.testing.assert_close(latents, eager[1], rtol=1e-5, atol=1e-5)


def test_twelve_compiled_blocks_cost_one_graph_more_in_batch_mode_after_a_plain_run(eager):
    pipe = compiled()
    plain, _ = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
    with tiny.attached(pipe, BATCH):
        more, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
        torch.testing.assert_close(latents, eager[2], rtol=1e-5, atol=1e-5)
        again, _ = new_graphs(lambda: tiny.call(pipe, steps=STEPS + 1, seed=1))
    assert plain == 1
    assert more <= 1
    assert again == 0


@pytest.mark.parametrize(
    ("config", "most"), [(STORE, 3), pytest.param(BATCH, 2, marks=pytest.mark.slow)], ids=["store", "batch"]
)
def test_a_first_run_inside_the_block_needs_no_more_graphs(eager, config, most):
    pipe = compiled()
    found, (latents, _) = new_graphs(lambda: tiny.locked_call(pipe, config, steps=STEPS))
    torch.testing.assert_close(latents, eager[1 if config is STORE else 2], rtol=1e-5, atol=1e-5)
    assert found <= most
    after, latents = new_graphs(lambda: tiny.call(pipe, steps=STEPS))
    assert after <= 1
    assert torch.equal(latents, eager[0])


@pytest.mark.parametrize(
    ("kernel", "rows"), [("hooks", "model"), ("hooks", "int8"), ("fused", "model"), ("backend", "model")]
)
def test_masks_of_other_sizes_cost_graphs_once(kernel, rows):
    pipe, eager = tiny.pipeline(WanPipeline), tiny.pipeline(WanPipeline)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    sizes, found = set(), []
    for columns in (1, 3, 5):
        pixels = tiny.pixel_mask()
        pixels[:, :16, : 16 * columns] = True
        masks = Masks.from_pixels(pixels, pipe)
        sizes.add(masks.background_rows)

        def edit(pipe, masks=masks):
            options = {"config": STORE, "source_prompt_embeds": tiny.SOURCE_PROMPT, "store": Store(rows)}
            with attach(pipe, tiny.source_latents(), masks, kernel=kernel, **options) as session:
                latents = tiny.call(pipe, steps=STEPS)
            tiny.assert_locked(session.trace.rows(), STORE)
            return latents

        more, latents = new_graphs(lambda edit=edit: edit(pipe))
        torch.testing.assert_close(latents, edit(eager), rtol=1e-5, atol=1e-5)
        found.append(more)
    assert len(sizes) == 3 and found[0] > 0 and found[2] == 0, found


def test_preset_plain_adds_no_graph(eager):
    pipe = compiled()
    tiny.call(pipe, steps=2)
    found, (latents, _) = new_graphs(lambda: tiny.locked_call(pipe, preset("plain"), steps=STEPS))
    assert found == 0
    assert torch.equal(latents, eager[0])


def test_a_transformer_compiled_as_a_whole_gives_the_same_latents():
    pipe = tiny.pipeline(WanPipeline)
    plain = tiny.call(pipe, steps=STEPS)
    expected, _ = tiny.locked_call(pipe, STORE, steps=STEPS)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for _ in range(2):  # the second time every graph is there before the taps are
        torch.testing.assert_close(tiny.call(pipe, steps=STEPS), plain, rtol=1e-5, atol=1e-5)
        latents, _ = tiny.locked_call(pipe, STORE, steps=STEPS)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert tiny.leftovers(pipe) == []


def compile_whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def put_another(pipe: Any) -> None:
    pipe.transformer = tiny.transformer(seed=3)


INSIDE = {
    compile_whole: r"pipe.transformer has been replaced by OptimizedModule since attach; wanted the one that",
    compile_in_place: r"WanTransformer3DModel.compile\(\) in place also compiles .*torch.compile.* before attach",
    put_another: r"pipe.transformer has been replaced by WanTransformer3DModel since attach; wanted the one that",
}


@pytest.mark.parametrize("change", INSIDE)
def test_a_transformer_that_the_lock_cannot_follow_is_refused_before_it_runs(change):
    pipe = tiny.pipeline(WanPipeline)
    attached = pipe.transformer
    attached.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the transformer ran"))
    with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), source_prompt_embeds=tiny.SOURCE_PROMPT):
        change(pipe)
        with pytest.raises(ValueError, match=INSIDE[change]):
            tiny.call(pipe, steps=STEPS)
    pipe.transformer = attached


def test_blocks_compiled_inside_the_block_give_the_same_latents(eager):
    pipe = tiny.pipeline(WanPipeline, layers=LAYERS)
    with tiny.attached(pipe, STORE):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(tiny.call(pipe, steps=STEPS), eager[1], rtol=1e-5, atol=1e-5)
