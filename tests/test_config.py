"""Tests of the settings: what is refused, which steps a window holds, and what the presets switch."""

import dataclasses
import json
import math

import pytest

from kvlock.config import PRESETS, KVLockConfig, preset

REFUSED = {
    "fusion": ("half", -0.1, 1.1, math.nan, True, None),
    "alpha_min": (-0.1, 1.5, math.nan, "0"),
    "tau": (0, 0.0, -1.0, 1e-50, math.inf, math.nan, True),
    "boost": (0.5, math.inf, math.nan, "2"),
    "kappa": (0, -3, 0.0, 1.5, math.nan, math.inf, True, None, "0.4"),
    "kappa_sigma": (0, -0.5, 1.5, math.nan, True),
    "window": (0, 1, -2, 0.0, 1.01, math.nan, True, None),
    "variance": ("local", None, 1),
    "x0": ("uncond", None),
    "optimized_scale": (1, 0, None, "yes"),
    "dynamic_guidance": (1, None),
    "guidance_scale": (-1.0, math.nan, math.inf, True, "5"),
    "background_guidance": (-0.5, math.inf, False),
    "zero_init_steps": (-1, 1.0, True),
    "layers": ((), (0, 0), (-1,), (1.0,), (True,), "012", 3),
    "control_blocks": (1, None),
    "branches": ("none", None),
    "source": ("disk", None),
    "dilate_tokens": (-1, 1.5, True),
    "composite": ("yes", None, True),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values], ids=repr
)
def test_nonsense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        KVLockConfig(**{name: value})


def test_every_setting_is_tried_with_nonsense():
    assert set(REFUSED) == {field.name for field in dataclasses.fields(KVLockConfig)}


def test_a_refusal_gives_the_value_found_and_the_value_wanted():
    with pytest.raises(ValueError, match=r"tau=-1\.0.*wanted a finite number >= 1e-30"):
        KVLockConfig(tau=-1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": 0},
        {"fusion": 1.0},
        {"alpha_min": 1},
        {"boost": 1.0},
        {"kappa": 1},
        {"kappa": 1.0},
        {"kappa_sigma": 1.0},
        {"window": 2},
        {"guidance_scale": 0.0},
        {"background_guidance": 1},
        {"layers": (3, 0)},
        {"dilate_tokens": 0},
    ],
    ids=repr,
)
def test_the_ends_of_every_range_are_allowed(settings):
    KVLockConfig(**settings)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVLockConfig().tau = 1.0


def test_layers_given_as_a_list_become_a_tuple():
    assert KVLockConfig(layers=[2, 5]).layers == (2, 5)


@pytest.mark.parametrize(
    "setting",
    [{"layers": (3,)}, {"control_blocks": True}, {"branches": "cond"}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_of_the_lock_without_a_lock_is_a_contradiction(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect with fusion='off'"):
        preset("plain", **setting)


@pytest.mark.parametrize("fusion", ["full", "off", 0.5])
def test_alpha_min_without_the_variance_schedule_is_a_contradiction(fusion):
    with pytest.raises(ValueError, match="alpha_min"):
        KVLockConfig(fusion=fusion, alpha_min=0.1)


def test_kappa_sigma_takes_the_place_of_the_default_kappa():
    config = KVLockConfig(kappa_sigma=0.7)
    assert config.kappa is None
    assert dataclasses.replace(KVLockConfig(), kappa_sigma=0.7) == config
    assert dataclasses.replace(config, tau=0.02).kappa_sigma == 0.7


@pytest.mark.parametrize("kappa", [20, 0.5, 1, 1.0, True])
def test_kappa_and_kappa_sigma_together_are_a_contradiction(kappa):
    with pytest.raises(ValueError, match="both define the window"):
        KVLockConfig(kappa=kappa, kappa_sigma=0.7)


def test_the_defaults_are_the_papers_last_20_of_50_steps_and_a_window_of_10():
    assert KVLockConfig().locked_steps(50) == range(30, 50)
    assert KVLockConfig().window_steps(50) == 10


@pytest.mark.parametrize(
    ("kappa", "num_steps", "expected"),
    [
        (1, 10, range(9, 10)),
        (1.0, 10, range(2, 10)),
        (0.25, 10, range(7, 10)),  # 2.5 steps round up to 3
        (0.07, 100, range(93, 100)),  # 0.07 * 100 is above 7 in binary
        (20, 10, range(2, 10)),
        (0.4, 1, range(1, 1)),
        (1.0, 2, range(2, 2)),
    ],
)
def test_kappa_counts_from_the_end_and_spares_the_first_two_steps(kappa, num_steps, expected):
    assert KVLockConfig(kappa=kappa).locked_steps(num_steps) == expected


@pytest.mark.parametrize("fusion", ["full", 0.5, 0])
def test_a_fixed_ratio_may_lock_from_the_first_step(fusion):
    assert KVLockConfig(fusion=fusion, kappa=1.0).locked_steps(10) == range(10)
    assert KVLockConfig(fusion=fusion, kappa=1.0).locked_steps(10, start=4) == range(4, 10)


def test_without_fusion_the_window_of_the_guidance_also_needs_two_predictions():
    assert KVLockConfig(fusion="off", kappa=1.0).locked_steps(10) == range(2, 10)


def test_a_run_that_starts_part_way_is_locked_at_the_same_steps_of_the_table():
    config = KVLockConfig(kappa=0.4)
    assert config.locked_steps(50, start=10) == range(30, 50)
    assert config.locked_steps(50, start=40) == range(42, 50)
    assert config.locked_steps(50, start=49) == range(50, 50)


@pytest.mark.parametrize(
    ("kappa_sigma", "expected"),
    [(0.6, range(3, 5)), (0.59, range(4, 5)), (1.0, range(2, 5)), (0.1, range(5, 5)), (0.2, range(4, 5))],
)
def test_kappa_sigma_locks_while_sigma_is_at_most_the_threshold(kappa_sigma, expected):
    assert KVLockConfig(kappa_sigma=kappa_sigma).locked_steps(5, (1.0, 0.9, 0.8, 0.6, 0.2)) == expected


def test_kappa_sigma_without_the_sigmas_of_the_run_is_refused():
    with pytest.raises(ValueError, match="needs the sigmas"):
        KVLockConfig(kappa_sigma=0.5).locked_steps(5)


@pytest.mark.parametrize("arguments", [{"sigmas": (1.0, 0.5)}, {"start": 5}, {"start": -1}, {"num_steps": 0}], ids=repr)
def test_a_table_that_does_not_fit_the_run_is_refused(arguments):
    with pytest.raises(ValueError, match=r"sigmas has 2|start=|num_steps=0"):
        KVLockConfig().locked_steps(**{"num_steps": 5} | arguments)


@pytest.mark.parametrize(
    ("window", "num_steps", "expected"),
    [(10, 50, 10), (10, 6, 6), (10, 1, 2), (0.2, 50, 10), (0.2, 6, 2), (0.2, 11, 3), (0.07, 100, 7), (2, 50, 2)],
)
def test_the_variance_window_holds_at_least_two_steps_and_at_most_the_run(window, num_steps, expected):
    assert KVLockConfig(window=window).window_steps(num_steps) == expected


def test_only_the_plain_preset_is_a_passthrough():
    assert [name for name, config in PRESETS.items() if config.passthrough] == ["plain"]


@pytest.mark.parametrize(
    "setting",
    [
        {"fusion": 0.0},
        {"optimized_scale": True},
        {"dynamic_guidance": True},
        {"guidance_scale": 5.0},
        {"background_guidance": 1.0},
        {"zero_init_steps": 1},
    ],
    ids=repr,
)
def test_any_setting_that_touches_the_run_ends_the_passthrough(setting):
    assert not preset("plain", **setting).passthrough


SWITCHES = {  # fusion, s*, omega, zero-init steps, variance
    "kv-lock": ("variance", True, True, 0, "masked"),
    "plain": ("off", False, False, 0, "masked"),
    "cfg-zero-star": ("off", True, False, 1, "masked"),
    "fixed-0.5": (0.5, True, True, 0, "masked"),
    "full-lock": ("full", False, False, 0, "masked"),
    "kv-only": ("variance", False, False, 0, "masked"),
    "omega-only": ("off", False, True, 0, "masked"),
    "s-star-only": ("off", True, False, 0, "masked"),
    "s-star-omega": ("off", True, True, 0, "masked"),
    "kv-omega": ("variance", False, True, 0, "masked"),
    "kv-s-star": ("variance", True, False, 0, "masked"),
    "global-detection": ("variance", True, True, 0, "global"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_switches_exactly_what_its_name_says(name):
    fusion, s_star, omega, zero_init, variance = SWITCHES[name]
    assert preset(name) == KVLockConfig(
        fusion=fusion,
        optimized_scale=s_star,
        dynamic_guidance=omega,
        zero_init_steps=zero_init,
        variance=variance,
    )
    assert preset(name).locks == (fusion != "off")


def test_all_presets_are_listed():
    assert set(PRESETS) == set(SWITCHES)


def test_a_preset_can_be_overridden_in_single_settings():
    assert preset("kv-lock", tau=0.05, kappa_sigma=0.7) == KVLockConfig(tau=0.05, kappa_sigma=0.7)
    assert PRESETS["kv-lock"] == KVLockConfig()


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kvlock'; known presets: kv-lock, plain, cfg-zero-star"):
        preset("kvlock")


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'alpha'; known settings: fusion, alpha_min"):
        preset("kv-lock", alpha=1.0)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["kv-lock"] = KVLockConfig(tau=1.0)


@pytest.mark.parametrize("config", [*PRESETS.values(), KVLockConfig(layers=(0, 2), kappa_sigma=0.5)], ids=repr)
def test_a_config_survives_json(config):
    assert KVLockConfig(**json.loads(json.dumps(config.to_dict()))) == config
