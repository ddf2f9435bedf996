"""A session from the first step to the last: its source pass, its ends, its interruptions and its refusals."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanVACEPipeline, WanVideoToVideoPipeline
from torch.utils._python_dispatch import TorchDispatchMode

import kvlock
from kvlock import KVLockConfig, Masks, preset
from kvlock.adapters.kernels import KERNELS

STEPS = 5
MIXING = KVLockConfig(kappa=3, window=3, tau=0.6)


@pytest.fixture(scope="module")
def wan():
    return tiny.pipeline(WanPipeline, "euler")


@pytest.fixture(scope="module")
def vace():
    return tiny.pipeline(WanVACEPipeline, "unipc")


@pytest.fixture(scope="module")
def v2v():
    return tiny.pipeline(WanVideoToVideoPipeline, "unipc")


def attach(pipe, config: KVLockConfig = MIXING, *, source=None, masks=None, prompt=tiny.SOURCE_PROMPT, **options):
    source = tiny.source_latents() if source is None else source
    return kvlock.attach(pipe, source, masks or tiny.masks(pipe), config=config, source_prompt_embeds=prompt, **options)


class Calls:
    """The latents, prompts and timesteps of each call of a transformer, the source pass included."""

    def __init__(self, pipe) -> None:
        self.found: list[dict] = []
        self.forward = type(pipe.transformer).forward
        pipe.transformer.forward = lambda **kwargs: self._call(pipe.transformer, kwargs)
        self.restore = lambda: vars(pipe.transformer).pop("forward")

    def _call(self, transformer, kwargs):
        self.found.append(kwargs)
        return self.forward(transformer, **kwargs)


def test_the_source_pass_runs_before_the_branches_on_the_noised_source_with_its_own_prompt(wan):
    calls, start = Calls(wan), tiny.rand(1, *tiny.LATENT, seed=8)
    with tiny.attached(wan, MIXING) as session:
        tiny.call(wan, steps=STEPS, latents=start)
    calls.restore()
    trace = session.trace.rows()
    found = iter(calls.found)
    for row in trace:
        if row["locked"]:
            source = next(found)
            expected = (1 - row["sigma"]) * tiny.source_latents() + row["sigma"] * start
            torch.testing.assert_close(source["hidden_states"], expected)
            assert torch.equal(source["encoder_hidden_states"], tiny.SOURCE_PROMPT)
            assert source["timestep"].tolist() == [row["timestep"]]
        cond, uncond = next(found), next(found)
        assert torch.equal(cond["encoder_hidden_states"], tiny.PROMPT["prompt_embeds"])
        assert torch.equal(uncond["encoder_hidden_states"], tiny.PROMPT["negative_prompt_embeds"])
    assert next(found, None) is None
    assert [row["locked"] for row in trace] == [False, False, True, True, True]
    assert [row["in_window"] for row in trace] == [row["locked"] for row in trace]


def test_video_to_video_takes_the_noise_out_of_its_first_latents(v2v):
    noise, sigma = tiny.rand(1, *tiny.LATENT, seed=8), None
    v2v.scheduler.set_timesteps(STEPS)
    sigma = float(v2v.scheduler.sigmas[1])
    start = (1 - sigma) * tiny.source_latents() + sigma * noise
    calls = Calls(v2v)
    with tiny.attached(v2v, MIXING) as session:
        tiny.call(v2v, steps=STEPS, latents=start, video=None, strength=0.8)
    calls.restore()
    trace = session.trace.rows()
    assert trace[0]["sigma"] == sigma
    sources = [c["hidden_states"] for c in calls.found if torch.equal(c["encoder_hidden_states"], tiny.SOURCE_PROMPT)]
    locked = [row["sigma"] for row in trace if row["locked"]]
    assert len(sources) == len(locked) == 2
    for found, level in zip(sources, locked, strict=True):
        torch.testing.assert_close(found, (1 - level) * tiny.source_latents() + level * noise, rtol=1e-5, atol=1e-5)


def test_vace_runs_the_source_with_the_controls_of_the_edit(vace):
    calls = Calls(vace)
    with tiny.attached(vace, preset("fixed-0.5", kappa=1)):
        tiny.call(vace, steps=2)
    calls.restore()
    source, cond = calls.found[2:4]
    assert torch.equal(source["encoder_hidden_states"], tiny.SOURCE_PROMPT)
    assert torch.equal(source["control_hidden_states"], cond["control_hidden_states"])


@pytest.mark.parametrize("kind", ["wan", "vace"])
def test_a_latent_composite_ends_on_the_source_outside_the_mask_bit_for_bit(wan, vace, kind):
    pipe = {"wan": wan, "vace": vace}[kind]
    masks = tiny.masks(pipe)
    latents, _ = tiny.locked_call(pipe, KVLockConfig(kappa=3, tau=0.6, composite="latent"), steps=STEPS)
    free, _ = tiny.locked_call(pipe, KVLockConfig(kappa=3, tau=0.6), steps=STEPS)
    inside = (masks.latent > 0).expand_as(latents)
    assert torch.equal(latents[~inside], tiny.source_latents()[~inside])
    assert torch.equal(latents[inside], free[inside])
    assert not torch.equal(free[~inside], tiny.source_latents()[~inside])


def test_the_trace_says_a_composite_only_of_the_run_that_had_it(wan):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return tensors

    with tiny.attached(wan, KVLockConfig(kappa=3, tau=0.6, composite="latent")) as session:
        tiny.call(wan, steps=STEPS)
        assert session.trace.to_dict()["summary"]["composite"] == "latent"
        tiny.call(wan, steps=STEPS, callback_on_step_end=stop)
        assert session.trace.to_dict()["summary"]["composite"] == "none"


class Syncs(TorchDispatchMode):
    """Counts the operators that make the host wait for a device, per step of the run."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "item")

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.steps[-1][name] += 1
        return func(*args, **(kwargs or {}))

    def next_step(self, pipe, step, timestep, tensors):
        self.steps.append(Counter())
        return tensors


class Waits(Exception):
    pass


class NoWaits(Syncs):
    """Raises where the host would wait, from the second step on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if len(self.steps) > 1 and func.overloadpacket.__name__ in self.WAITS:
            raise Waits(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("kind", [WanVACEPipeline, WanVideoToVideoPipeline])
@pytest.mark.parametrize("schedule", ["euler", "unipc"])
def test_no_number_is_read_from_a_device_inside_the_loop(kind, schedule, source):
    """In pipelines that read none themselves; `WanPipeline` compares its timestep with a bound at every step."""
    pipe = tiny.pipeline(kind, schedule)
    config = KVLockConfig(kappa=3, window=3, tau=0.6, source=source, background_guidance=1.0)
    with tiny.attached(pipe, config), NoWaits() as watched:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=watched.next_step)

    def read(pipe, step, timestep, tensors):
        tensors["latents"].sum().item()
        return watched.next_step(pipe, step, timestep, tensors)

    with pytest.raises(Waits, match="_local_scalar_dense"), attach(pipe, config), NoWaits() as watched:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=read)


@pytest.mark.parametrize("source", ["store", "batch"])
def test_a_prompt_that_a_callback_lengthens_has_a_source_prompt_as_long(wan, source):
    calls = Calls(wan)

    def lengthen(pipe, step, timestep, tensors):
        longer = {name: torch.cat([embeds, embeds], dim=1) for name, embeds in tensors.items() if name != "latents"}
        return tensors | (longer if step == 3 else {})

    changed = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with tiny.attached(wan, KVLockConfig(kappa=3, window=3, tau=0.6, source=source)):
        tiny.call(wan, steps=STEPS, callback_on_step_end=lengthen, callback_on_step_end_tensor_inputs=changed)
    calls.restore()
    last = calls.found[-3 if source == "store" else -2]["encoder_hidden_states"][:1]
    assert last.shape[1] == 2 * tiny.TEXT
    assert torch.equal(last, torch.nn.functional.pad(tiny.SOURCE_PROMPT, (0, 0, 0, tiny.TEXT)))


READS = ("tolist", "cpu", "numpy", "item", "__bool__", "__float__", "__int__", "__index__")
MAKES = ("tensor", "as_tensor", "asarray", "from_numpy")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("kind", ["wan", "vace", "v2v"])
def test_in_the_loop_kvlock_reads_no_tensor_on_the_host_and_sends_none_to_the_device(
    wan, vace, v2v, kind, source, kernel, monkeypatch
):
    """On a CPU `tolist` and its like dispatch no operator and copies go nowhere: they are watched by who calls them."""
    pipe, found = {"wan": wan, "vace": vace, "v2v": v2v}[kind], []

    def watch(owner, name, counts):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            caller = sys._getframe(1)
            if caller.f_globals.get("__name__", "").startswith("kvlock") and counts(*args[1:], *kwargs.values()):
                found.append(f"{name} in {caller.f_code.co_name}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for name in READS:
        watch(torch.Tensor, name, lambda *args: True)
    watch(torch.Tensor, "to", lambda *args: any(not isinstance(to, torch.dtype | bool) for to in args))
    for name in MAKES:
        watch(torch, name, lambda *args: True)
    # Before the loop the schedule is read, and what a run needs sent to its device.
    def before_the_loop(*_):
        found.clear()
        begin.remove()

    begin = pipe.transformer.register_forward_pre_hook(before_the_loop)
    config = KVLockConfig(kappa=3, window=3, tau=0.6, source=source, background_guidance=1.0, composite="latent")
    with attach(pipe, config=config, kernel=kernel) as session:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=lambda _pipe, step, *_: found.append("step") or {})
        assert found == ["step"] * len(session.trace)
        trace = session.trace.rows()
    assert found[-1] == "tolist in _to_rows"
    tiny.assert_locked(trace, session.trace.config)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("source", ["store", "batch"])
@pytest.mark.parametrize("kind", ["wan", "vace", "v2v"])
def test_from_the_second_step_on_the_host_waits_no_more_often_than_in_the_plain_pipeline(
    wan, vace, v2v, kind, source, kernel
):
    pipe = {"wan": wan, "vace": vace, "v2v": v2v}[kind]
    config = KVLockConfig(kappa=3, window=3, tau=0.6, source=source, background_guidance=1.0, composite="latent")
    with Syncs() as plain:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=plain.next_step)
    with tiny.attached(pipe, config, kernel=kernel) as session, Syncs() as locked:
        tiny.call(pipe, steps=STEPS, callback_on_step_end=locked.next_step)
    steps = len(session.trace)
    assert len(plain.steps) == len(locked.steps) == steps + 1
    assert locked.steps[1:steps] == plain.steps[1:steps]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_callback_restores_the_pipeline(wan, error):
    before = tiny.call(wan, steps=STEPS)

    def fail(pipe, step, timestep, tensors):
        if step == 3:
            raise error("stop")
        return tensors

    with pytest.raises(error, match="stop"), attach(wan):
        tiny.call(wan, steps=STEPS, callback_on_step_end=fail)
    assert tiny.leftovers(wan) == []
    assert torch.equal(tiny.call(wan, steps=STEPS), before)


def test_an_error_inside_the_source_pass_restores_the_pipeline(wan):
    before = tiny.call(wan, steps=STEPS)
    last = wan.transformer.blocks[-1]
    with pytest.raises(RuntimeError, match="in the source"), attach(wan) as session:

        def fail(module, args):
            if session.in_source_pass:
                raise RuntimeError("in the source")

        handle = last.register_forward_pre_hook(fail)
        tiny.call(wan, steps=STEPS)
    handle.remove()
    assert not session.in_source_pass
    assert tiny.leftovers(wan) == []
    assert torch.equal(tiny.call(wan, steps=STEPS), before)


def test_a_run_broken_off_inside_the_block_does_not_disturb_the_next_one(wan):
    expected, trace = tiny.locked_call(wan, MIXING, steps=STEPS)

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("stop")

    with tiny.attached(wan, MIXING) as session:
        with pytest.raises(RuntimeError, match="stop"):
            tiny.call(wan, steps=STEPS, callback_on_step_end=fail)
        assert torch.equal(tiny.call(wan, steps=STEPS), expected)
    assert session.trace.rows() == trace


def test_source_latents_of_another_shape_are_refused(wan):
    wrong = tiny.rand(1, 16, 3, 12, 10)
    message = r"source_latents has shape \[1, 16, 3, 12, 10\]; wanted \[1, 16, 3, 12, 12\]"
    with pytest.raises(ValueError, match=message):
        tiny.locked_call(wan, MIXING, source=wrong, steps=STEPS)
    assert tiny.leftovers(wan) == []


def test_masks_of_another_size_are_refused(wan):
    pixels = torch.zeros(tiny.FRAMES, 64, 96, dtype=torch.bool)
    pixels[:, :8, :8] = True
    masks = Masks.from_pixels(pixels, wan)
    message = r"masks were made for latents of \[T, h, w\] = \[3, 8, 12\]; the edit's latents have \[3, 12, 12\]"
    with pytest.raises(ValueError, match=message), attach(wan, masks=masks):
        tiny.call(wan, steps=STEPS)
    assert tiny.leftovers(wan) == []


@pytest.mark.parametrize("shape", [(1, 9, 32), (1, 8, 31), (2, 8, 32), (8, 32)], ids=str)
def test_a_source_prompt_that_does_not_fit_is_refused(wan, shape):
    message = rf"source_prompt_embeds has shape {re.escape(str(list(shape)))}; wanted \[1 or B, 8 or fewer, 32\]"
    with pytest.raises(ValueError, match=message), attach(wan, prompt=tiny.rand(*shape)):
        tiny.call(wan, steps=STEPS)


@pytest.mark.parametrize("after_a_run", [False, True])
def test_a_scheduler_replaced_inside_the_block_is_refused(wan, after_a_run):
    ours = wan.scheduler
    with pytest.raises(ValueError, match=r"was pipe\.scheduler replaced\?"), attach(wan):
        if after_a_run:
            tiny.call(wan, steps=2)
        wan.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        tiny.call(wan, steps=2)
    wan.scheduler = ours
    assert tiny.leftovers(wan) == []


def test_a_third_call_of_the_transformer_in_one_step_is_refused(wan):
    x, t = tiny.rand(1, *tiny.LATENT), torch.tensor([1000.0])
    with pytest.raises(ValueError, match="ran more than twice in one step"), attach(wan), torch.no_grad():
        wan.scheduler.set_timesteps(STEPS)
        wan._guidance_scale, wan._current_timestep = 5.0, t[0]  # as its call sets them
        for _ in range(3):
            wan.transformer(hidden_states=x, timestep=t, encoder_hidden_states=tiny.SOURCE_PROMPT)
