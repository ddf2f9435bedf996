"""The source's forward: it ends after the last block that locks, the edit is the same, and the model is whole again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import tiny_ltx
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
from diffusers import LTXPipeline, SkyReelsV2Pipeline, WanPipeline, WanVACEPipeline
from torch._dynamo.utils import counters

import kvlock
from kvlock import KVLockConfig
from kvlock.adapters import root
from kvlock.adapters.families import FAMILIES

STEPS, LAYERS = 4, 4
WINDOW: dict[str, Any] = {"fusion": 0.5, "kappa": 2}
TWO = KVLockConfig(**WINDOW, layers=(1, 0))
CPU = torch.device("cpu")
KINDS = {WanPipeline: tiny, WanVACEPipeline: tiny, SkyReelsV2Pipeline: tiny, LTXPipeline: tiny_ltx}


def pipeline(kind: type) -> Any:
    return tiny_ltx.pipeline(layers=LAYERS) if kind is LTXPipeline else tiny.pipeline(kind, layers=LAYERS)


def blocks_of(pipe: Any) -> torch.nn.ModuleList:
    return pipe.transformer.transformer_blocks if isinstance(pipe, LTXPipeline) else pipe.transformer.blocks


def attach(pipe: Any, config: KVLockConfig, **options: Any) -> Any:
    of = KINDS[type(pipe)]
    options = {"source_prompt_embeds": of.SOURCE_PROMPT} | options
    return kvlock.attach(pipe, of.source_latents(), of.masks(pipe), config=config, **options)


def edited(pipe: Any, config: KVLockConfig, **options: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    with attach(pipe, config, **options) as session:
        latents = KINDS[type(pipe)].call(pipe, steps=STEPS)
    assert [row["fusion_ratio"] for row in session.trace.rows()] == [[0.0]] * 2 + [[0.5]] * 2
    return latents, session.trace.rows()


@contextlib.contextmanager
def counted(pipe: Any, session: Any) -> Iterator[dict[str, Counter[int]]]:
    """How often each main block runs, on the source and on the edit."""
    ran: dict[str, Counter[int]] = {"source": Counter(), "edit": Counter()}

    def hook_of(i: int) -> Any:
        return lambda *_: ran["source" if session.in_source_pass else "edit"].update([i])

    with contextlib.ExitStack() as undo:
        for i, block in enumerate(blocks_of(pipe)):
            undo.enter_context(block.register_forward_pre_hook(hook_of(i)))
        yield ran


@pytest.mark.parametrize("changed", ["latents", "prompt", "masks"])
def test_what_the_caller_does_to_its_own_tensors_inside_the_block_changes_no_edit(changed):
    pipe, config = tiny.pipeline(WanPipeline), KVLockConfig(**WINDOW, background_guidance=1.0, composite="latent")
    expected, _ = edited(pipe, config)
    latents, prompt, masks = tiny.source_latents(), tiny.SOURCE_PROMPT.clone(), tiny.masks(pipe)
    own = {"latents": [latents], "prompt": [prompt], "masks": [masks.latent, masks.weight, masks.index]}
    with kvlock.attach(pipe, latents, masks, config=config, source_prompt_embeds=prompt):
        for tensor in own[changed]:
            tensor.zero_()
        assert torch.equal(tiny.call(pipe, steps=STEPS), expected)


@pytest.fixture
def to_the_end(monkeypatch):
    """Lets the source's forward run every block."""

    def choose() -> None:
        monkeypatch.setattr(root, "_up_to_the_last_lock", lambda *_: contextlib.nullcontext())

    return choose


@pytest.mark.parametrize("kind", KINDS)
def test_the_sources_forward_ends_after_the_last_block_that_locks(kind):
    pipe = pipeline(kind)
    with attach(pipe, TWO) as session, counted(pipe, session) as ran:
        KINDS[kind].call(pipe, steps=STEPS)
    calls = STEPS if kind is LTXPipeline else 2 * STEPS  # LTX has both branches in one
    assert ran == {"source": {0: 2, 1: 2}, "edit": dict.fromkeys(range(LAYERS), calls)}


CASES = [(kind, kernel) for kind in KINDS for kernel in ("hooks", "backend")] + [(WanPipeline, "fused")]


@pytest.mark.parametrize("kind, kernel", CASES)
def test_the_edit_is_that_of_a_source_that_runs_to_the_end(to_the_end, kind, kernel):
    short, trace = edited(pipeline(kind), TWO, kernel=kernel)
    to_the_end()
    whole, expected = edited(pipeline(kind), TWO, kernel=kernel)
    assert torch.equal(short, whole) and trace == expected


def test_every_block_of_the_source_runs_where_all_lock_or_the_last_one_does():
    pipe = pipeline(WanPipeline)
    for layers in (None, (3, 0)):
        with attach(pipe, KVLockConfig(**WINDOW, layers=layers)) as session, counted(pipe, session) as ran:
            tiny.call(pipe, steps=STEPS)
        assert ran["source"] == dict.fromkeys(range(LAYERS), 2)


@pytest.mark.parametrize(("controlled", "ran"), [((0, 1, 2, 3), 2), ((0, 2), 1), ((0,), 1)])
def test_of_control_blocks_those_run_that_add_to_a_block_that_runs(to_the_end, controlled, ran):
    def call() -> tuple[torch.Tensor, list[int]]:
        pipe = tiny.pipeline(WanVACEPipeline, layers=LAYERS, vace_layers=[*controlled])
        seen = []
        with attach(pipe, TWO) as session:
            for i, block in enumerate(pipe.transformer.vace_blocks):
                block.register_forward_pre_hook(lambda *_, i=i: seen.append(i) if session.in_source_pass else None)
            return tiny.call(pipe, steps=STEPS), seen

    latents, blocks = call()
    assert blocks == 2 * [*range(ran)]
    to_the_end()
    whole, blocks = call()
    assert blocks == 2 * [*range(len(controlled))] and torch.equal(latents, whole)


def test_control_blocks_that_lock_are_recorded_beside_a_single_main_block(to_the_end):
    config = KVLockConfig(**WINDOW, layers=(0,), control_blocks=True)
    pipe = pipeline(WanVACEPipeline)
    stacks = pipe.transformer.blocks, pipe.transformer.vace_blocks
    short, trace = edited(pipe, config)
    assert (pipe.transformer.blocks, pipe.transformer.vace_blocks) == stacks
    to_the_end()
    whole, expected = edited(pipeline(WanVACEPipeline), config)
    assert torch.equal(short, whole) and trace == expected


def test_a_source_beside_the_edit_runs_to_the_end_with_it():
    pipe = pipeline(WanPipeline)
    with attach(pipe, KVLockConfig(**WINDOW, layers=(0,), source="batch")) as session, counted(pipe, session) as ran:
        tiny.call(pipe, steps=STEPS)
    assert ran["edit"] == dict.fromkeys(range(LAYERS), 2 * STEPS)


def test_a_recording_is_made_of_as_many_blocks_and_gives_the_same_edit(tmp_path):
    pipe = pipeline(WanPipeline)
    expected, _ = edited(pipe, TWO)
    source = tiny.source_latents(), tiny.masks(pipe)
    options = {"config": TWO, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with kvlock.record(pipe, tmp_path / "source", *source, **options) as session, counted(pipe, session) as ran:
        tiny.call(pipe, steps=STEPS)
    assert ran == {"source": {0: 2, 1: 2}, "edit": {}}
    latents, _ = edited(pipe, TWO, recording=kvlock.Recording(tmp_path / "source"), source_prompt_embeds=None)
    assert torch.equal(latents, expected)


def test_the_blocks_are_back_after_each_source_pass_and_after_one_that_fails():
    pipe = pipeline(WanPipeline)
    blocks, plain = pipe.transformer.blocks, tiny.call(pipe, steps=STEPS)
    edited(pipe, TWO)
    assert pipe.transformer.blocks is blocks and len(blocks) == LAYERS
    with attach(pipe, TWO) as session:

        def fail(*_: Any) -> None:
            if session.in_source_pass:
                raise RuntimeError("no room")

        with blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="no room"):
            tiny.call(pipe, steps=STEPS)
        assert pipe.transformer.blocks is blocks
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    assert tiny.leftovers(pipe) == []


def spread(pipe: Any) -> None:
    """As accelerate's device maps do."""
    for block in pipe.transformer.blocks[2:]:
        add_hook_to_module(block, AlignDevicesHook(execution_device=CPU))


PLACED = {
    "by-block": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "by-leaf": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level"),
    "by-model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "spread": spread,
}


@pytest.mark.parametrize("place", PLACED.values(), ids=PLACED)
def test_every_block_of_the_source_runs_where_hooks_place_the_weights(place):
    pipe = pipeline(WanPipeline)
    expected, _ = edited(pipe, TWO)
    place(pipe)
    with attach(pipe, TWO) as session, counted(pipe, session) as ran:
        latents = tiny.call(pipe, steps=STEPS)
    assert ran["source"] == dict.fromkeys(range(LAYERS), 2)
    assert torch.equal(latents, expected)


def test_weights_that_move_at_the_sources_forward_all_move():
    pipe, elsewhere = pipeline(WanPipeline), torch.device("meta")
    model, hook = pipe.transformer, CpuOffload(elsewhere)
    add_hook_to_module(model, hook)
    with root._up_to_the_last_lock(model, FAMILIES["WanTransformer3DModel"], TWO):
        hook.pre_forward(model)
    assert {parameter.device for parameter in model.parameters()} == {elsewhere}


def test_a_transformer_compiled_as_a_whole_needs_a_graph_for_each_kind_of_call_and_no_more():
    pipe = pipeline(WanPipeline)
    expected, _ = edited(pipe, TWO)
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for _ in range(2):
        tiny.call(pipe, steps=STEPS)
        latents, _ = edited(pipe, TWO)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 3  # plain, of the source, and with the lock
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch._dynamo.reset()
