"""What a run says of itself is what it did: the trace, the notices, and what it keeps."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline

import kvlock
from kvlock import KVLockConfig, preset

STEPS = 5
LOCK = {"kappa": 3, "window": 3, "tau": 0.6}


@pytest.fixture(scope="module")
def wan():
    return tiny.pipeline(WanPipeline)


def run(pipe, config, **kwargs):
    """Latents, trace rows and the notices of one attached run."""
    masks = tiny.masks(pipe, dilate_tokens=config.dilate_tokens)
    prompt = tiny.SOURCE_PROMPT
    with warnings.catch_warnings(record=True) as caught, kvlock.attach(
        pipe, tiny.source_latents(), masks, config=config, source_prompt_embeds=prompt
    ) as session:
        warnings.simplefilter("always")
        latents = tiny.call(pipe, **({"steps": STEPS} | kwargs))
    notices = [str(w.message) for w in caught if w.category is UserWarning and "kvlock" in w.filename]
    return latents, session.trace.rows(), notices


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 7.0}, {"background_guidance": 1.0}], ids=str)
def test_without_an_unconditional_branch_the_trace_shows_no_guidance_and_one_notice_says_so(wan, settings):
    _, rows, notices = run(wan, KVLockConfig(**LOCK, **settings), guidance_scale=1.0)
    assert [row["guidance_scale"] for row in rows] == [[1.0]] * STEPS
    assert [row["s_star"] for row in rows] == [[1.0]] * STEPS
    tiny.assert_locked(rows, KVLockConfig(**LOCK))
    assert len(notices) == 1 and "no unconditional branch" in notices[0]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")], ids=str)
def test_a_guidance_scale_that_is_no_number_is_refused(wan, scale):
    with pytest.raises(ValueError, match=rf"guidance_scale={scale} is not allowed; wanted a finite number"):
        run(wan, preset("plain"), guidance_scale=scale)
    assert tiny.leftovers(wan) == []


def test_plain_without_an_unconditional_branch_has_nothing_to_say(wan):
    assert run(wan, preset("plain"), guidance_scale=1.0)[2] == []


def test_locking_an_unconditional_branch_that_is_not_there_is_no_lock_and_says_so(wan):
    latents, rows, notices = run(wan, preset("full-lock", branches="uncond"), guidance_scale=1.0)
    assert torch.equal(latents, tiny.call(wan, steps=STEPS, guidance_scale=1.0))
    assert all(row["fusion_ratio"] == [0.0] and row["forwards"] == 1 for row in rows)
    assert any(row["in_window"] for row in rows) and not any(row["locked"] for row in rows)
    assert notices == ['nothing was locked: branches="uncond", and this run has no unconditional branch']


@pytest.mark.parametrize(("settings", "steps"), [({}, 1), ({}, 2), ({"kappa_sigma": 1e-5}, STEPS)])
def test_a_run_without_a_locked_step_says_so(wan, settings, steps):
    _, rows, notices = run(wan, KVLockConfig(**settings), steps=steps)
    assert not any(row["locked"] for row in rows)
    assert len(notices) == 1 and notices[0].startswith("nothing was locked: no step of this run lies in the window")


def test_a_locked_run_has_nothing_to_say(wan):
    config = KVLockConfig(**LOCK)
    _, rows, notices = run(wan, config)
    tiny.assert_locked(rows, config)
    assert notices == []


def test_text_prompts_meet_a_source_prompt_encoded_by_the_pipelines_own_default():
    pipe = tiny.miniature()
    arguments = {"prompt_embeds": None, "negative_prompt_embeds": None, "prompt": "a red circle", "steps": 2}
    config = preset("fixed-0.5", kappa=1)
    with pytest.warns(UserWarning, match="no source prompt"), tiny.attached(pipe, config, prompt=None):
        default = tiny.call(pipe, **arguments)
    embeds = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=512)[0]
    with tiny.attached(pipe, config, prompt=embeds):
        assert torch.equal(tiny.call(pipe, **arguments), default)


def test_prompts_of_two_lengths_may_follow_each_other_in_one_block(wan):
    config = preset("fixed-0.5", kappa=2)
    short = {"prompt_embeds": tiny.rand(1, 8, 32, seed=2), "negative_prompt_embeds": tiny.rand(1, 8, 32, seed=3)}
    long = {name: torch.nn.functional.pad(value, (0, 0, 0, 4)) for name, value in short.items()}
    expected = [run(wan, config, **prompt)[0] for prompt in (long, short)]
    with tiny.attached(wan, config):
        found = [tiny.call(wan, steps=STEPS, **prompt) for prompt in (long, short)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_begin_index_that_the_pipeline_sets_late_is_heeded():
    """At a large shift UniPC rounds two steps to one timestep; looked up by value, the run would start a step late."""
    pipe = tiny.pipeline(WanPipeline)
    pipe.scheduler = tiny.scheduler("unipc", shift=16.0)
    _, rows, _ = run(pipe, preset("plain"), steps=100)
    assert [row["step"] for row in rows] == list(range(100))
    assert rows[0]["timestep"] == rows[1]["timestep"] and rows[0]["sigma"] > rows[1]["sigma"]


def test_a_subclass_of_a_pipeline_starts_as_its_base_does():
    class Mine(WanVideoToVideoPipeline):
        pass

    config = preset("fixed-0.5", kappa=1.0)
    base, _ = tiny.locked_call(tiny.pipeline(WanVideoToVideoPipeline), config, strength=0.7)
    mine, _ = tiny.locked_call(tiny.pipeline(Mine), config, strength=0.7)
    assert torch.equal(mine, base)


def test_one_prompt_for_two_samples_works_beside_the_source_too(wan):
    two = {"num_videos_per_prompt": 2}
    store, _ = tiny.locked_call(wan, KVLockConfig(**LOCK), **two)
    batch, _ = tiny.locked_call(wan, KVLockConfig(**LOCK, source="batch"), **two)
    torch.testing.assert_close(batch, store, rtol=1e-5, atol=1e-5)


def test_a_second_expert_keeps_no_rows_of_the_first_and_waits_for_two_predictions():
    pipe = tiny.pipeline(WanPipeline)
    pipe.register_modules(transformer_2=tiny.transformer(seed=1))
    pipe.register_to_config(boundary_ratio=0.8)
    _, rows, _ = run(pipe, KVLockConfig(kappa=1.0, window=3, tau=1.0, alpha_min=0.3), steps=7)
    assert len({row["source_bytes"] for row in rows if row["fusion_ratio"][0] > 0}) == 1
    after = [row for row in rows if row["timestep"] < 800]
    ratios = [row["fusion_ratio"][0] for row in after]
    assert ratios[:2] == [0.0, 0.0] and all(ratio >= 0.3 - 1e-6 for ratio in ratios[2:])
    assert all(row["in_window"] for row in after)
    assert [row["locked"] for row in after] == [False, False] + [True] * (len(after) - 2)
    assert all(row["forwards"] == 2 + row["locked"] for row in rows)


def test_an_expert_too_short_for_a_variance_runs_no_source_and_says_so():
    pipe = tiny.pipeline(WanPipeline)
    pipe.register_modules(transformer_2=tiny.transformer(seed=1))
    pipe.register_to_config(boundary_ratio=0.85)
    latents, rows, notices = run(pipe, KVLockConfig(kappa=2, optimized_scale=False, dynamic_guidance=False), steps=4)
    assert [row["forwards"] for row in rows] == [2] * 4
    assert torch.equal(latents, tiny.call(pipe, steps=4))
    assert len(notices) == 1 and "two predictions of its transformer" in notices[0]


def test_a_transformer_attached_through_its_compiled_wrapper_is_not_attached_again():
    pipe, other = tiny.pipeline(WanPipeline), tiny.pipeline(WanPipeline)
    other.transformer = torch.compile(pipe.transformer, backend="eager")
    config = KVLockConfig(**LOCK)
    expected, _ = tiny.locked_call(pipe, config, steps=STEPS)
    with tiny.attached(pipe, config):
        with pytest.raises(ValueError, match=r"blocks\[0\] is attached already"), tiny.attached(other, config):
            pass
        assert torch.equal(tiny.call(pipe, steps=STEPS), expected)
    assert tiny.leftovers(pipe) == []


def test_a_source_prompt_padded_longer_than_the_calls_own_is_cut_to_it(wan):
    config = preset("fixed-0.5", kappa=2)
    padded = torch.nn.functional.pad(tiny.SOURCE_PROMPT, (0, 0, 0, 9))
    expected, _ = tiny.locked_call(wan, config, steps=STEPS)
    with tiny.attached(wan, config, prompt=padded):
        assert torch.equal(tiny.call(wan, steps=STEPS), expected)


def test_after_the_block_a_session_keeps_its_trace_and_nothing_else(wan):
    class Stop(Exception):
        pass

    def stop(pipe, step, timestep, kwargs):
        if step == 3:
            raise Stop
        return kwargs

    masks = tiny.masks(wan)
    with pytest.raises(Stop), kvlock.attach(
        wan, tiny.source_latents(), masks, config=KVLockConfig(**LOCK), source_prompt_embeds=tiny.SOURCE_PROMPT
    ) as session:
        tiny.call(wan, steps=STEPS, callback_on_step_end=stop)
    assert len(session.trace) == 4
    assert session._run is None
