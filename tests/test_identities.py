"""What must hold bit for bit: off is the pipeline, the ends of the ratio are exact, and a run repeats itself."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline

from kvlock import KVLockConfig, preset

STEPS = 5
KINDS = {"wan": WanPipeline, "vace": WanVACEPipeline, "v2v": WanVideoToVideoPipeline}
OVERFLOWING = torch.full((1, *tiny.LATENT), 3e38)  # finite, and NaN after the first layer
MIXING = KVLockConfig(kappa=3, window=3, tau=0.6)


@pytest.fixture(scope="module")
def pipe_of():
    return functools.cache(lambda kind, schedule: tiny.pipeline(KINDS[kind], schedule))


@pytest.fixture(scope="module")
def plain_of(pipe_of):
    """Final latents of a pipeline that nothing was ever attached to."""
    untouched = functools.cache(lambda kind, schedule: tiny.pipeline(KINDS[kind], schedule))
    return functools.cache(lambda kind, schedule: tiny.call(untouched(kind, schedule), steps=STEPS))


class SeenByAttention:
    """Keys and values [B, H, N, D] of every video self-attention, in order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        original = torch.nn.functional.scaled_dot_product_attention

        def spy(query, key, value, *args, **kwargs):
            if key.shape[-2] == num_tokens:
                self.pairs.append((key.clone(), value.clone()))
            return original(query, key, value, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)


@pytest.mark.parametrize("schedule", ["euler", "unipc"])
@pytest.mark.parametrize("kind", KINDS)
def test_preset_plain_is_the_pipeline_bit_for_bit_and_is_traced(pipe_of, plain_of, kind, schedule):
    latents, trace = tiny.locked_call(pipe_of(kind, schedule), preset("plain"), steps=STEPS)
    assert torch.equal(latents, plain_of(kind, schedule))
    assert len(trace) == (STEPS if kind != "v2v" else 4)
    assert [row["variance_masked"][0] > 0 for row in trace] == [False] + [True] * (len(trace) - 1)
    for row in trace:
        assert (row["fusion_ratio"], row["guidance_scale"], row["s_star"]) == ([0.0], [5.0], [1.0])
        assert (row["forwards"], row["source_bytes"], row["locked"]) == (2, 0, False)
    assert any(row["in_window"] for row in trace)


@pytest.mark.parametrize("source", ["store", "batch"])
def test_a_ratio_of_zero_is_the_pipeline_bit_for_bit_even_where_the_source_gives_nan(pipe_of, plain_of, source):
    config = KVLockConfig(fusion=0.0, kappa=1.0, optimized_scale=False, dynamic_guidance=False, source=source)
    latents, trace = tiny.locked_call(pipe_of("wan", "unipc"), config, source=OVERFLOWING, steps=STEPS)
    assert all(row["locked"] and row["forwards"] == (3 if source == "store" else 4) for row in trace)
    if source == "store":
        assert torch.equal(latents, plain_of("wan", "unipc"))
    else:  # a larger batch may take another path through the matrix products
        torch.testing.assert_close(latents, plain_of("wan", "unipc"), rtol=1e-5, atol=1e-5)


def test_a_ratio_of_zero_leaves_every_key_and_value_bit_for_bit(pipe_of, monkeypatch):
    pipe = pipe_of("wan", "euler")
    seen = SeenByAttention(monkeypatch, tiny.masks(pipe).num_tokens)
    tiny.call(pipe, steps=STEPS)
    plain, seen.pairs = seen.pairs, []
    config = KVLockConfig(fusion=0.0, kappa=1, optimized_scale=False, dynamic_guidance=False)
    tiny.locked_call(pipe, config, source=OVERFLOWING, steps=STEPS)
    source = seen.pairs[-6:-4]  # two layers, run before the last step's two branches
    assert all(tensor.isnan().all() for pair in source for tensor in pair)
    del seen.pairs[-6:-4]
    assert len(plain) == len(seen.pairs) == STEPS * 2 * 2
    for before, after in zip(plain, seen.pairs, strict=True):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", ["wan", "vace"])
def test_a_ratio_of_one_replays_the_keys_and_values_of_the_source_bit_for_bit(pipe_of, monkeypatch, kind):
    pipe = pipe_of(kind, "euler")
    masks = tiny.masks(pipe)
    background = masks.index.long()
    foreground = torch.tensor([n for n in range(masks.num_tokens) if n not in background])
    seen = SeenByAttention(monkeypatch, masks.num_tokens)
    tiny.call(pipe, steps=STEPS)
    layers = len(seen.pairs) // (STEPS * 2)
    plain_cond, plain_uncond = seen.pairs[-2 * layers : -layers], seen.pairs[-layers:]
    seen.pairs = []
    # Only the last step is locked, so that everything before it, and its first layer's input, is the plain run's.
    tiny.locked_call(pipe, preset("full-lock", kappa=1), steps=STEPS)
    source, cond, uncond = (seen.pairs[-n * layers :][:layers] for n in (3, 2, 1))
    main = slice(layers - 2, layers)  # VACE's control blocks come first and are not locked
    for branch in (cond, uncond):
        for new, old in zip(branch[main], source[main], strict=True):
            assert torch.equal(new[0][:, :, background], old[0][:, :, background])
            assert torch.equal(new[1][:, :, background], old[1][:, :, background])
            assert not torch.equal(new[0][:, :, foreground], old[0][:, :, foreground])
    first = layers - 2
    for locked, plain in ((cond[first], plain_cond[first]), (uncond[first], plain_uncond[first])):
        for new, old in zip(locked, plain, strict=True):
            assert torch.equal(new[:, :, foreground], old[:, :, foreground])
            assert not torch.equal(new[:, :, background], old[:, :, background])


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_the_context_gives_back_the_pipeline_bit_for_bit(pipe_of, plain_of, kind):
    latents, _ = tiny.locked_call(pipe_of(kind, "unipc"), MIXING, steps=STEPS)
    assert not torch.equal(latents, plain_of(kind, "unipc"))
    assert torch.equal(tiny.call(pipe_of(kind, "unipc"), steps=STEPS), plain_of(kind, "unipc"))


@pytest.mark.parametrize("source", ["store", "batch"])
def test_runs_with_one_seed_are_identical_inside_one_context_and_across_contexts(pipe_of, source):
    pipe = pipe_of("wan", "unipc")
    config = KVLockConfig(kappa=3, window=3, tau=0.6, source=source)
    first, first_trace = tiny.locked_call(pipe, config, steps=STEPS)
    second, _ = tiny.locked_call(pipe, config, steps=STEPS)
    assert torch.equal(first, second)
    with tiny.attached(pipe, config) as session:
        other = tiny.call(pipe, steps=STEPS, seed=1)
        again = tiny.call(pipe, steps=STEPS)
    assert not torch.equal(other, again)
    assert torch.equal(again, first)
    assert session.trace.rows() == first_trace
