"""kernel="backend": the lock inside diffusers' attention dispatcher agrees with the lock by hooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from kvlock import KVLockConfig, preset
from kvlock.adapters.backend_registry import default_backend, set_default_backend

STEPS = 5
WINDOW: dict[str, Any] = {"kappa": 3, "window": 3, "tau": 0.6}
KINDS = {"wan": WanPipeline, "vace": WanVACEPipeline}
SETTINGS: dict[str, dict[str, Any]] = {
    "store": {},
    "batch": {"source": "batch"},
    "fixed-0.5": {"fusion": 0.5},
    "full": {"fusion": "full"},
    "full-batch": {"fusion": "full", "source": "batch"},
    "uncond-branch-only": {"branches": "uncond"},
    "layer-1-only": {"layers": (1,)},
}


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny.pipeline(kind) for name, kind in KINDS.items()}


@pytest.fixture(autouse=True)
def default_stays():
    before = default_backend()
    yield
    assert default_backend() is before


@pytest.fixture
def math_backend():
    """A pipeline whose processors have another attention backend than the process."""
    before, pipe = default_backend(), tiny.pipeline(WanPipeline)
    pipe.transformer.set_attention_backend("_native_math")
    set_default_backend(before)
    return pipe


def count_calls(monkeypatch, *backends: AttentionBackendName) -> Counter[str]:
    """Calls of these backends from now on, by name."""
    found: Counter[str] = Counter()

    def counting(backend: AttentionBackendName, plain: Any) -> Any:
        def attention(**kwargs: Any) -> Any:
            found[backend.value] += 1
            return plain(**kwargs)

        return attention

    table = _AttentionBackendRegistry._backends
    for backend in backends:
        monkeypatch.setitem(table, backend, counting(backend, table[backend]))
    return found


def backends_of(pipe: Any) -> list[dict[str, Any]]:
    """What every attention processor has of its own."""
    return [dict(vars(m.processor)) for m in pipe.transformer.modules() if hasattr(m, "processor")]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_gives_the_latents_of_the_hooks(pipes, kind, schedule, settings):
    pipe, config = pipes[kind], KVLockConfig(**WINDOW, **SETTINGS[settings])
    pipe.scheduler = tiny.scheduler(schedule)
    expected, trace = tiny.locked_call(pipe, config, steps=STEPS)
    with tiny.Operators() as operators:
        latents, found = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert [row["forwards"] for row in found] == [row["forwards"] for row in trace]
    assert bool(operators.locks) == (config.fusion != "full")


def test_half_precision_is_locked_too():
    """What is mixed is counted: in so small a model the lock changes latents little more than rounding does."""
    pipe = tiny.pipeline(WanPipeline)
    pipe.transformer.to(torch.bfloat16)
    embeds = {name: value.bfloat16() for name, value in tiny.PROMPT.items()}
    with tiny.Operators() as operators:
        tiny.locked_call(pipe, KVLockConfig(**WINDOW), steps=STEPS, kernel="backend", **embeds)
    assert operators.locks == {"kv_lerp_attention_": 2 * 2 * 3}  # layers, branches, steps


def test_control_blocks_agree_too(pipes):
    config = KVLockConfig(**WINDOW, control_blocks=True)
    expected, _ = tiny.locked_call(pipes["vace"], config, steps=STEPS)
    with tiny.Operators() as operators:
        latents, _ = tiny.locked_call(pipes["vace"], config, steps=STEPS, kernel="backend")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert operators.locks == {"kv_lerp_attention_": 4 * 2 * 3}  # layers, branches, steps


@pytest.mark.parametrize("settings", ["store", "batch", "full", "full-batch"])
def test_two_samples_with_a_shared_source_agree(pipes, settings):
    config = KVLockConfig(**WINDOW, **SETTINGS[settings])
    extra = {name: embeds.expand(2, -1, -1) for name, embeds in tiny.PROMPT.items()}
    extra["latents"] = tiny.rand(2, *tiny.LATENT, seed=3)
    expected, _ = tiny.locked_call(pipes["wan"], config, steps=STEPS, **extra)
    latents, _ = tiny.locked_call(pipes["wan"], config, steps=STEPS, kernel="backend", **extra)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings, each", [("store", 2), ("batch", 2), ("uncond-branch-only", 1), ("full", 0)])
@pytest.mark.parametrize("kernel", ["backend", "hooks", "fused"])
def test_one_lerp_a_layer_branch_and_step_and_none_where_the_lock_is_full(pipes, kernel, settings, each):
    """From hooks or the fused pass the session goes over to the backend, whose layers have no other lock then."""
    pipe, steps, layers = pipes["wan"], 3, 2
    with (
        tiny.attached(pipe, KVLockConfig(**WINDOW, **SETTINGS[settings]), kernel=kernel),
        tiny.Operators() as operators,
    ):
        if kernel != "backend":
            pipe.transformer.set_attention_backend("kvlock")
        tiny.call(pipe, steps=STEPS)
    assert operators.locks == ({"kv_lerp_attention_": layers * each * steps} if each else {})
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize("kernel", ["hooks", "fused", "backend"])
@pytest.mark.parametrize(
    "name, step",
    [("wan", None), ("wan", 0), ("wan", 2), ("wan", 3), ("vace", None), ("vace", 2)],
    ids=["before-the-run", "before-the-window", "inside-it", "later", "vace-before-the-run", "vace-inside-the-window"],
)
def test_the_backend_may_be_chosen_at_any_time(pipes, name, kernel, step):
    pipe, config = pipes[name], KVLockConfig(**WINDOW)
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    before = backends_of(pipe), default_backend()

    def choose(_pipe, now, timestep, kwargs):
        if now == step:
            pipe.transformer.set_attention_backend("KVLock")
        return kwargs

    with tiny.attached(pipe, config, kernel=kernel), tiny.Operators() as operators:
        if step is None:
            pipe.transformer.set_attention_backend("kvlock")
        assert (backends_of(pipe), default_backend()) == before
        latents = tiny.call(pipe, steps=STEPS, callback_on_step_end=choose)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert operators.locks["kv_lerp_attention_"] > 0
    assert (backends_of(pipe), default_backend()) == before


def test_chosen_between_two_branches_it_records_the_source_anew(pipes):
    pipe, config, calls = pipes["wan"], KVLockConfig(**WINDOW), []
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)

    def choose(module: Any, args: tuple, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2 * 2 + 2:  # two steps of two branches; in the third the source, then this one
            pipe.transformer.set_attention_backend("kvlock")

    with tiny.attached(pipe, config) as session:
        handle = pipe.transformer.register_forward_hook(choose)  # after the session's own
        latents = tiny.call(pipe, steps=STEPS)
        handle.remove()
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert [row["forwards"] for row in session.trace.rows()] == [2, 2, 4, 3, 3]


@pytest.mark.parametrize("settings, of_the_layers", [("store", 2 * 13 - 2 * 6), ("full", 2 * 13)])
def test_everything_but_the_lerp_goes_to_the_backend_that_was_active_before(
    math_backend, monkeypatch, settings, of_the_layers
):
    pipe, config = math_backend, KVLockConfig(**WINDOW, **SETTINGS[settings])
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    found = count_calls(monkeypatch, AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH)
    latents, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    of_the_prompt = 2 * 13  # layers, forwards: 2 branches in 5 steps, the source in 3
    assert found == {"_native_math": of_the_layers + of_the_prompt}


def test_a_backend_chosen_inside_the_window_serves_the_rest_and_stays(monkeypatch):
    pipe, before = tiny.pipeline(WanPipeline), default_backend()
    config = KVLockConfig(**WINDOW)
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    found = count_calls(monkeypatch, AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH)

    def choose(_pipe, step, timestep, kwargs):
        if step == STEPS - 2:
            pipe.transformer.set_attention_backend("_native_math")
        return kwargs

    try:
        with tiny.attached(pipe, config, kernel="backend"), tiny.Operators() as operators:
            latents = tiny.call(pipe, steps=STEPS, callback_on_step_end=choose)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        assert found["_native_math"] == 2 * 3 + 2 * 1  # layers: of the prompt in 3 forwards, of the source in its own
        assert operators.locks == {"kv_lerp_attention_": 2 * 2 * 3}
        assert backends_of(pipe) == [{"_attention_backend": AttentionBackendName._NATIVE_MATH}] * 4
    finally:
        set_default_backend(before)


def test_the_processors_own_backends_and_the_default_are_as_they_were(pipes):
    pipe = pipes["vace"]
    blocks = pipe.transformer.blocks
    blocks[0].attn1.set_attention_backend("_native_math")
    blocks[1].attn1.processor._attention_backend = None
    try:
        before = backends_of(pipe), default_backend()
        tiny.locked_call(pipe, KVLockConfig(**WINDOW), steps=STEPS, kernel="backend")
        assert (backends_of(pipe), default_backend()) == before
    finally:
        for block in blocks[:2]:
            del block.attn1.processor._attention_backend


def test_a_default_set_by_way_of_another_model_is_taken_back(pipes):
    with tiny.attached(pipes["wan"], KVLockConfig(**WINDOW), kernel="backend"):
        tiny.call(pipes["wan"], steps=STEPS)
        pipes["vace"].vae.set_attention_backend("kvlock")
        assert default_backend().value == "kvlock"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_also_after_an_exception(pipes, error):
    pipe = pipes["vace"]
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    own, before = backends_of(pipe), tiny.call(pipe, steps=2)

    def interrupt(_pipe, step, timestep, kwargs):
        if step == STEPS - 2:  # a locked one, so that the backend is in its places
            assert all(block.attn1.processor._attention_backend.value == "kvlock" for block in pipe.transformer.blocks)
            raise error
        return kwargs

    with pytest.raises(error), tiny.attached(pipe, KVLockConfig(**WINDOW), kernel="backend"):
        tiny.call(pipe, steps=STEPS, callback_on_step_end=interrupt)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert backends_of(pipe) == own
    assert tiny.leftovers(pipe) == []
    assert torch.equal(tiny.call(pipe, steps=2), before)


def test_two_sessions_in_a_row_give_the_same_and_the_pipeline_between_them_its_own(pipes):
    pipe, config = pipes["wan"], KVLockConfig(**WINDOW)
    plain = tiny.call(pipe, steps=STEPS)
    first, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)
    second, _ = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    assert torch.equal(first, second)
    assert torch.equal(tiny.call(pipe, steps=STEPS), plain)


def test_preset_plain_is_bit_identical_and_calls_no_layer(pipes):
    pipe = pipes["wan"]
    with tiny.attached(pipe, preset("plain"), kernel="backend"), tiny.Operators() as operators:
        pipe.transformer.set_attention_backend("kvlock")
        latents = tiny.call(pipe, steps=STEPS)
    assert torch.equal(latents, tiny.call(pipe, steps=STEPS))
    assert operators.locks == {}


def test_calls_outside_the_window_are_the_pipelines_own(pipes):
    """Latents are compared where the window begins, before the lock has touched them."""
    pipe, seen = pipes["wan"], []
    config = KVLockConfig(kappa=2, window=3, tau=0.6, optimized_scale=False, dynamic_guidance=False)

    def keep(_pipe, step, timestep, kwargs):
        seen.append(kwargs["latents"].clone())
        own = {value for processor in backends_of(pipe) for value in processor.values()}
        assert own == ({"kvlock"} if step == 3 else set())  # the last step ends the run
        return kwargs

    with tiny.attached(pipe, config, kernel="backend") as session:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=keep)
    free = sum(not row["locked"] for row in session.trace.rows())
    assert free == 3
    assert torch.equal(seen[free - 1], tiny.call(pipe, steps=STEPS, callback_on_step_end=stop_after(free)))
    assert not torch.equal(seen[-1], tiny.call(pipe, steps=STEPS))


def stop_after(steps: int) -> Any:
    """A callback that lets a run of the pipeline end early, with the latents it has then."""

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= steps
        return kwargs

    return interrupt


def test_a_full_lock_holds_the_rows_and_room_for_the_foreground(pipes):
    pipe = pipes["wan"]
    config = KVLockConfig(**WINDOW, fusion="full")
    rows, tokens = tiny.masks(pipe).background_rows, tiny.masks(pipe).num_tokens
    _, hooks = tiny.locked_call(pipe, config, steps=STEPS)
    _, backend = tiny.locked_call(pipe, config, steps=STEPS, kernel="backend")
    assert backend[-1]["source_bytes"] * rows == hooks[-1]["source_bytes"] * tokens > 0
