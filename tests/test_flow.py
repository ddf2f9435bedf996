"""Tests of the schedule against diffusers' own schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from kvlock.flow import SCHEDULERS, Flow

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def euler(shift=3.0, **config):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def unipc(shift=3.0, **config):
    return UniPCMultistepScheduler(flow_shift=shift, **{**FLOW, **config})


def dpm(shift=3.0, **config):
    return DPMSolverMultistepScheduler(flow_shift=shift, **{**FLOW, **config})


def ddim(**config):
    return DDIMScheduler(**{**V, "clip_sample": False, **config})


MAKERS = {
    "euler-shift3": lambda: euler(3.0),
    "euler-shift16": lambda: euler(16.0),
    "euler-inverted": lambda: euler(1.0, invert_sigmas=True),
    "unipc-shift3": lambda: unipc(3.0),
    "unipc-shift16": lambda: unipc(16.0),
    "dpm-shift3": lambda: dpm(3.0),
    "dpm-v": lambda: DPMSolverMultistepScheduler(**V),
    "dpm-v-karras": lambda: DPMSolverMultistepScheduler(**V, use_karras_sigmas=True),
    "ddim": ddim,
    "ddim-zero-snr": lambda: ddim(**ZERO_SNR),
    "cogvideox-ddim": lambda: CogVideoXDDIMScheduler(**V),
    "cogvideox-ddim-zero-snr": lambda: CogVideoXDDIMScheduler(**V, **ZERO_SNR),
    "cogvideox-dpm": lambda: CogVideoXDPMScheduler(**V, **ZERO_SNR),
}


def make(name, num_steps=10):  # 10 divides 1000: DDIM itself then steps from one timestep to exactly the next
    scheduler = MAKERS[name]()
    scheduler.set_timesteps(num_steps)
    return scheduler


def sample(seed):
    return torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))


def perfect_output(flow, z0, eps, step):
    """What a model that knows z0 and eps would put out."""
    if flow.kind == "flow":
        return eps - z0
    if flow.kind == "flow_inverted":
        return z0 - eps
    return flow.a[step] * eps - flow.b[step] * z0


@pytest.mark.parametrize("name", MAKERS)
def test_the_clean_prediction_of_a_perfect_model_is_the_clean_latent(name):
    flow = Flow.from_scheduler(make(name))
    z0, eps = sample(0), sample(1)
    for step in range(len(flow.timesteps)):
        output = perfect_output(flow, z0, eps, step)
        torch.testing.assert_close(flow.x0(flow.noise(z0, eps, step), output, step), z0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MAKERS if "euler" in name or "ddim" in name])
def test_a_step_of_a_perfect_model_leads_to_the_noise_level_of_the_next_step(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    z0, eps = sample(0), sample(1)
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        output = perfect_output(flow, z0, eps, step)
        following = scheduler.step(output, timestep, flow.noise(z0, eps, step)).prev_sample
        torch.testing.assert_close(following, flow.noise(z0, eps, step + 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["unipc-shift3", "unipc-shift16", "dpm-shift3", "dpm-v", "dpm-v-karras"])
def test_x0_equals_what_a_multistep_scheduler_keeps(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    x = sample(0)
    for step, timestep in enumerate(scheduler.timesteps):
        output = sample(10 + step)
        expected = flow.x0(x, output, step)
        x = scheduler.step(output, timestep, x).prev_sample
        exact = 0 if "-v" not in name else 1e-6  # the scheduler takes the roots from another side
        torch.testing.assert_close(scheduler.model_outputs[-1], expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("name", [name for name in MAKERS if "ddim" in name])
def test_x0_equals_the_prediction_ddim_returns(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    x = sample(0)
    for step, timestep in enumerate(scheduler.timesteps):
        output = sample(10 + step)
        expected = flow.x0(x, output, step)
        result = scheduler.step(output, timestep, x)
        torch.testing.assert_close(result.pred_original_sample, expected, rtol=1e-6, atol=1e-6)
        x = result.prev_sample


def test_x0_equals_the_prediction_cogvideox_dpm_returns():
    scheduler = make("cogvideox-dpm")
    flow = Flow.from_scheduler(scheduler)
    x, output = sample(0), sample(1)
    for step, timestep in enumerate(scheduler.timesteps):
        before = scheduler.timesteps[step - 1] if step else None
        _, prediction = scheduler.step(output, None, timestep, before, x, return_dict=False)
        torch.testing.assert_close(prediction, flow.x0(x, output, step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["euler-shift3", "euler-shift16"])
def test_noising_equals_scale_noise(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    z0, eps = sample(0), sample(1)
    for step, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(flow.noise(z0, eps, step), scheduler.scale_noise(z0, timestep[None], eps))


@pytest.mark.parametrize("name", [name for name in MAKERS if "euler" not in name])
def test_noising_equals_add_noise(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    z0, eps = sample(0), sample(1)
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.add_noise(z0, eps, timestep.repeat(2))
        torch.testing.assert_close(flow.noise(z0, eps, step), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["euler-shift3", "euler-shift16", "unipc-shift3", "unipc-shift16", "dpm-shift3"])
def test_sigmas_are_the_schedulers_own_and_not_the_rounded_timesteps(name):
    scheduler = make(name)
    assert Flow.from_scheduler(scheduler).sigmas == tuple(scheduler.sigmas[:-1].tolist())


@pytest.mark.parametrize("name", MAKERS)
def test_sigmas_are_noise_shares_that_fall(name):
    sigmas = Flow.from_scheduler(make(name)).sigmas
    assert len(sigmas) == 10
    assert all(0 <= later < earlier <= 1 for earlier, later in pairwise(sigmas))


@pytest.mark.parametrize("name", MAKERS)
def test_the_noise_of_a_sample_is_found_again(name):
    flow = Flow.from_scheduler(make(name))
    z0, eps = sample(0), sample(1)
    for step in range(6):
        torch.testing.assert_close(flow.eps_from(flow.noise(z0, eps, step), z0, step), eps, rtol=0, atol=1e-4)


def test_a_step_without_noise_has_no_noise_to_find():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="step 1 holds no noise"):
        Flow.from_scheduler(scheduler).eps_from(sample(0), sample(1), 1)


def test_everything_is_computed_in_fp32():
    flow = Flow.from_scheduler(make("unipc-shift3"))
    x, z0 = sample(0).bfloat16(), sample(1).bfloat16()
    for result in (flow.noise(z0, x, 3), flow.x0(x, z0, 3), flow.eps_from(x, z0, 3)):
        assert result.dtype == torch.float32
    for method in (flow.noise, flow.x0, flow.eps_from):
        assert torch.equal(method(x, z0, 3), method(x.float(), z0.float(), 3))


@pytest.mark.parametrize("name", MAKERS)
def test_device_coefficients_are_the_host_ones(name):
    flow = Flow.from_scheduler(make(name))
    on_device = flow.coefficients("cpu")
    for field in ("x_scale", "v_scale"):
        values = getattr(on_device, field)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.tensor(getattr(flow, field)))


@pytest.mark.parametrize("name", MAKERS)
def test_every_timestep_is_found_again(name):
    scheduler = make(name)
    flow = Flow.from_scheduler(scheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        assert flow.step_of(timestep) == step
        assert flow.step_of(timestep.expand(2)) == step
        assert flow.step_of(timestep.item()) == step


@pytest.mark.parametrize("make_scheduler", [euler, unipc, dpm])
@pytest.mark.parametrize("shift", [3.0, 16.0])
def test_the_first_timestep_of_a_truncated_run_is_found_in_the_full_table(make_scheduler, shift):
    scheduler = make_scheduler(shift)
    scheduler.set_timesteps(50)
    flow = Flow.from_scheduler(scheduler)
    first = scheduler.timesteps[15:][0]
    assert flow.step_of(first) == scheduler.index_for_timestep(first) == 15
    run = flow.starting_at(15)
    assert (run.start, run.sigmas) == (15, flow.sigmas)
    scheduler.set_begin_index(15)
    assert run == Flow.from_scheduler(scheduler)


def test_equal_timesteps_are_told_apart_as_the_scheduler_does():
    scheduler = unipc(16.0)
    scheduler.set_timesteps(100)
    first = scheduler.timesteps[0]
    assert first == scheduler.timesteps[1]  # a large shift rounds the first two to one int
    assert Flow.from_scheduler(scheduler).step_of(first) == scheduler.index_for_timestep(first) == 1
    scheduler.set_begin_index(0)
    assert Flow.from_scheduler(scheduler).step_of(first) == 0


def test_the_begin_index_of_the_scheduler_starts_the_run():
    scheduler = make("euler-shift3")
    assert Flow.from_scheduler(scheduler).start == 0
    scheduler.set_begin_index(4)
    assert Flow.from_scheduler(scheduler).start == 4


@pytest.mark.parametrize("start", [-1, 10])
def test_a_start_outside_the_table_is_refused(start):
    with pytest.raises(ValueError, match="outside the scheduler's 10 timesteps"):
        Flow.from_scheduler(make("euler-shift3")).starting_at(start)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_table_is_refused(step):
    flow = Flow.from_scheduler(make("euler-shift3"))
    for method in (flow.noise, flow.x0, flow.eps_from):
        with pytest.raises(ValueError, match="outside the scheduler's 10 timesteps"):
            method(sample(0), sample(1), step)


@pytest.mark.parametrize("timestep", [123.4, torch.tensor([]), torch.tensor([999.0, 500.0])], ids=repr)
def test_a_timestep_that_is_no_step_is_refused(timestep):
    with pytest.raises(ValueError, match=r"timestep 123\.4 is not one of|no value|2 different values"):
        Flow.from_scheduler(make("unipc-shift3")).step_of(timestep)


def test_a_subclass_of_a_supported_scheduler_is_supported():
    class Tuned(UniPCMultistepScheduler):
        pass

    scheduler = Tuned(**FLOW)
    scheduler.set_timesteps(5)
    assert Flow.from_scheduler(scheduler).kind == "flow"


def test_an_unknown_scheduler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown scheduler EulerDiscreteScheduler") as refusal:
        Flow.from_scheduler(EulerDiscreteScheduler())
    assert all(name in str(refusal.value) for name in SCHEDULERS)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (unipc(prediction_type="epsilon"), "UniPCMultistepScheduler with prediction_type='epsilon'"),
        (unipc(use_flow_sigmas=False), "use_flow_sigmas=False is not supported; wanted use_flow_sigmas=True"),
        (unipc(thresholding=True), "thresholding=True"),
        (dpm(prediction_type="v_prediction"), "use_flow_sigmas=True is not supported; wanted use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler(), "prediction_type='epsilon'|use_flow_sigmas=False"),
        (ddim(prediction_type="epsilon"), "prediction_type='epsilon'"),
        (ddim(clip_sample=True), "clip_sample=True"),
        (ddim(thresholding=True), "thresholding=True"),
        (CogVideoXDDIMScheduler(prediction_type="sample"), "prediction_type='sample'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prediction_type_or_option_that_breaks_the_formula_is_refused(scheduler, reason):
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=reason):
        Flow.from_scheduler(scheduler)


@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_without_a_schedule_is_refused(name):
    with pytest.raises(ValueError, match="call its set_timesteps first"):
        Flow.from_scheduler(MAKERS[name]())
