"""lock_schedule: from the variance to the strength of the lock and of the guidance."""

import pytest
import torch
from refusals import Bad, assert_refused, bad_inputs
from samples import NAN
from tolerance import assert_within_roundings

from kvlock_kernels import lock_schedule

EACH_IMPLEMENTATION = True


@pytest.mark.parametrize(
    ("variance", "fusion_ratio", "guidance_scale"),
    [
        (0.0, 0.0, 5.0),
        (0.0025, 0.25, 5.0),
        (0.01, 1.0, 5.0),
        (0.015, 1.0, 7.5),
        (0.02, 1.0, 10.0),
        (3.0, 1.0, 10.0),
        (float("inf"), 1.0, 10.0),
    ],
)
def test_the_lock_fills_up_below_tau_and_the_guidance_grows_above_it(
    variance: float, fusion_ratio: float, guidance_scale: float
) -> None:
    schedule = lock_schedule(torch.tensor([variance]), torch.tensor(5.0), tau=0.01, boost=2.0)
    assert_within_roundings(schedule.fusion_ratio, torch.tensor([fusion_ratio]), 2)
    assert_within_roundings(schedule.guidance_scale, torch.tensor([guidance_scale]), 2)


def test_the_defaults_are_those_of_the_paper() -> None:
    variance, base = torch.tensor([0.004, 0.013, 0.5]), torch.tensor(5.0)
    default = lock_schedule(variance, base)
    spelt_out = lock_schedule(variance, base, tau=0.01, boost=2.0, alpha_min=0.0)
    assert torch.equal(default.fusion_ratio, spelt_out.fusion_ratio)
    assert torch.equal(default.guidance_scale, spelt_out.guidance_scale)


def test_alpha_min_is_the_floor_of_the_ratio_only() -> None:
    schedule = lock_schedule(torch.tensor([0.0, 0.005, 0.2]), torch.tensor(5.0), alpha_min=0.4)
    assert_within_roundings(schedule.fusion_ratio, torch.tensor([0.4, 0.5, 1.0]), 1)
    assert schedule.guidance_scale.tolist() == [5.0, 5.0, 10.0]


def test_a_boost_of_one_keeps_the_guidance() -> None:
    assert lock_schedule(torch.tensor([0.0, 9.0]), torch.tensor(5.0), boost=1.0).guidance_scale.tolist() == [5.0, 5.0]


def test_each_sample_has_its_own_base_guidance() -> None:
    schedule = lock_schedule(torch.tensor([0.0, 9.0, 9.0]), torch.tensor([3.0, 4.0, 5.0]))
    assert schedule.guidance_scale.tolist() == [3.0, 8.0, 10.0]


def test_the_ends_are_exact_at_the_threshold_itself() -> None:
    tau = 0.0123
    schedule = lock_schedule(torch.tensor([tau]), torch.tensor(5.0), tau=tau)
    assert schedule.fusion_ratio.item() == 1.0 and schedule.guidance_scale.item() == 5.0


def test_a_nan_variance_shows_in_both_results_of_its_sample() -> None:
    schedule = lock_schedule(torch.tensor([NAN, 0.001]), torch.tensor(5.0))
    assert schedule.fusion_ratio.isnan().tolist() == schedule.guidance_scale.isnan().tolist() == [True, False]


def test_results_are_fp32_per_sample_even_without_samples() -> None:
    for samples in (0, 3, 130):
        for result in lock_schedule(torch.zeros(samples), torch.tensor(5.0)):
            assert result.shape == (samples,) and result.dtype == torch.float32 and result.isfinite().all()


def test_strided_input_is_taken() -> None:
    variance = torch.tensor([0.002, NAN, 0.004, NAN])[::2]
    assert_within_roundings(lock_schedule(variance, torch.tensor(5.0)).fusion_ratio, torch.tensor([0.2, 0.4]), 1)


@bad_inputs(
    Bad({"variance": 0.1}, "variance", "float 0.1", "a tensor"),
    Bad({"variance": torch.tensor(0.1)}, "variance", "shape []", "[B]"),
    Bad({"variance": torch.zeros(2).bfloat16()}, "variance", "dtype bfloat16", "dtype float32"),
    Bad({"guidance_scale": 5.0}, "guidance_scale", "float 5.0", "a tensor"),
    Bad({"guidance_scale": torch.ones(3)}, "guidance_scale", "shape [3]", "[] or [B] = [] or [2]"),
    Bad({"guidance_scale": torch.tensor(5)}, "guidance_scale", "dtype int64", "dtype float32"),
    Bad({"tau": 0.0}, "tau", "0.0", "above 0"),
    Bad({"tau": NAN}, "tau", "nan", "above 0"),
    Bad({"tau": 1e-46}, "tau", "1e-46", "above 0"),  # 0 in fp32
    Bad({"tau": True}, "tau", "True", "a finite number"),
    Bad({"tau": torch.tensor(0.1)}, "tau", "tensor(0.1000)", "a finite number"),
    Bad({"boost": 0.5}, "boost", "0.5", "at least 1"),
    Bad({"boost": float("inf")}, "boost", "inf", "a finite number"),
    Bad({"boost": 1e300}, "boost", "1e+300", "a finite number"),  # inf in fp32
    Bad({"alpha_min": -0.1}, "alpha_min", "-0.1", "a number in [0, 1]"),
    Bad({"alpha_min": 1.5}, "alpha_min", "1.5", "a number in [0, 1]"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    assert_refused(lock_schedule, {"variance": torch.zeros(2), "guidance_scale": torch.tensor(5.0)}, bad)
