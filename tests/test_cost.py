"""Tests of the estimate against numbers that are known."""

from types import SimpleNamespace

import pytest

from kvlock.config import KVLockConfig, preset
from kvlock.cost import ModelSizes, estimate
from kvlock.store import Store

WAN_1_3B = ModelSizes(layers=30, heads=12, head_dim=128, token_values=64, control_layers=15)
WAN_14B = ModelSizes(layers=40, heads=40, head_dim=128, token_values=64)
LOCK = KVLockConfig()


def cost(config=LOCK, model=WAN_1_3B, *, tokens=32760, rows=20000, **options):
    return estimate(model, config, tokens=tokens, background_rows=rows, **options)


@pytest.mark.parametrize(
    "model, tokens, gibibytes", [(WAN_1_3B, 32760, 5.6), (WAN_14B, 32760, 25.0), (WAN_14B, 75600, 57.7)]
)
def test_one_step_of_a_wan_model_takes_the_published_bytes(model, tokens, gibibytes):
    assert cost(model=model, tokens=tokens).bytes_full / 2**30 == pytest.approx(gibibytes, abs=0.05)


def test_bytes_follow_the_formula():
    assert cost().bytes_full == 30 * 2 * 32760 * 1536 * 2
    assert cost().bytes_background == 30 * 2 * 20000 * 1536 * 2
    assert cost(bytes_per_value=4).bytes_background == 2 * cost().bytes_background


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kernel='taps' is not known; wanted one of 'hooks', 'fused', 'backend'"):
        cost(kernel="taps")


def test_chosen_layers_and_control_blocks_change_the_bytes():
    some = KVLockConfig(layers=(0, 4, 7))
    assert cost(some).bytes_full * 10 == cost().bytes_full
    assert cost(KVLockConfig(control_blocks=True)).bytes_full * 30 == cost().bytes_full * 45


def test_fifty_steps_cost_a_hundred_and_twenty_forwards_in_store_and_a_hundred_and_forty_in_batch():
    store, batch = cost(), cost(KVLockConfig(source="batch"))
    assert (store.steps, store.locked_steps, store.forwards_plain) == (50, 20, 100)
    assert (store.forwards, batch.forwards) == (120, 140)
    assert store.bytes_kept == store.bytes_background
    assert batch.bytes_kept == 0


def test_a_stored_source_runs_up_to_the_last_locked_block_and_one_beside_the_edit_runs_them_all():
    some = {"layers": (14, 3)}
    assert cost(KVLockConfig(**some)).source_blocks == 15
    assert cost(KVLockConfig(**some, source="batch")).source_blocks == cost().source_blocks == 30
    assert cost(preset("plain")).source_blocks == 0
    assert cost(KVLockConfig(**some)).forwards == cost().forwards


def test_without_guidance_there_is_one_branch():
    assert (cost(guidance_scale=1.0).forwards_plain, cost(guidance_scale=1.0).forwards) == (50, 70)
    assert cost(KVLockConfig(source="batch"), guidance_scale=1.0).forwards == 70


def test_locking_one_branch_runs_the_source_beside_that_branch_only():
    assert cost(KVLockConfig(source="batch", branches="cond")).forwards == 120
    assert cost(KVLockConfig(branches="uncond")).forwards == 120
    assert cost(KVLockConfig(branches="uncond"), guidance_scale=1.0).forwards == 50


@pytest.mark.parametrize("name", ["plain", "s-star-omega"])
def test_a_preset_without_a_lock_needs_no_source(name):
    without = cost(preset(name))
    assert (without.locked_steps, without.forwards, without.bytes_kept) == (0, 100, 0)
    assert without.bytes_background == cost().bytes_background


def test_a_window_by_sigma_needs_the_sigmas():
    sigmas = [1 - k / 50 for k in range(50)]
    assert cost(KVLockConfig(kappa_sigma=0.2), sigmas=sigmas).locked_steps == 10
    with pytest.raises(ValueError, match="pass sigmas"):
        cost(KVLockConfig(kappa_sigma=0.2))


def test_sizes_are_read_from_a_transformer_config():
    sizes = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}
    config = SimpleNamespace(**sizes, patch_size=[1, 2, 2], vace_layers=list(range(15)))
    assert ModelSizes.of(config) == WAN_1_3B
    config.vace_layers = None
    assert ModelSizes.of(config).control_layers == 0
    del config.num_layers
    with pytest.raises(ValueError, match="num_layers=None; wanted an int"):
        ModelSizes.of(config)
    config.num_layers, config.patch_size = 30, 2
    assert ModelSizes.of(config).token_values == 64
    config.patch_size = [2, 2]
    with pytest.raises(ValueError, match=r"patch_size=\[2, 2\]; wanted an int or three ints"):
        ModelSizes.of(config)


def test_a_run_that_starts_part_way_is_locked_at_the_same_steps_and_runs_fewer():
    part = cost(num_steps=50, start=10)
    assert (part.steps, part.locked_steps, part.forwards_plain, part.forwards) == (40, 20, 80, 100)
    assert cost(num_steps=50, start=45).locked_steps == 3  # the first two of the run have no variance yet
    with pytest.raises(ValueError, match="start=50 lies outside a table of 50 steps"):
        cost(num_steps=50, start=50)
    with pytest.raises(ValueError, match="start=50 lies outside a table of 50 steps"):
        cost(preset("plain"), num_steps=50, start=50)


def test_two_windows_of_clean_predictions_are_kept_in_fp32():
    window = LOCK.window_steps(50)
    assert cost().bytes_predictions == 2 * window * 32760 * 64 * 4
    assert cost(start=10).bytes_predictions == cost().bytes_predictions
    assert cost(preset("plain"), bytes_per_value=4).bytes_predictions == cost().bytes_predictions


def test_a_guidance_scale_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="guidance_scale=nan is not allowed; wanted a finite number"):
        cost(guidance_scale=float("nan"))


def test_rows_and_layers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="wanted 0 to 100"):
        cost(tokens=100, rows=101)
    with pytest.raises(ValueError, match="layers names block 30; the transformer has 30"):
        cost(KVLockConfig(layers=(0, 30)))


def test_rows_elsewhere_leave_two_layers_on_the_device_and_move_for_every_branch():
    on_device, on_host, on_disk = (cost(store=Store(place=place)) for place in ("device", "host", "disk"))
    kept = on_device.bytes_kept
    assert kept == on_host.bytes_kept == on_disk.bytes_kept == on_device.bytes_device
    assert (on_device.bytes_host, on_device.bytes_disk, on_device.bytes_moved) == (0, 0, 0)
    assert on_host.bytes_device == on_disk.bytes_device == kept // 15  # 2 of 30 layers
    assert on_disk.bytes_host == kept // 10
    assert (on_host.bytes_host, on_host.bytes_disk) == (kept, 0)
    assert on_disk.bytes_disk == kept
    layer = kept // 30
    assert on_device.bytes_recording == 20 * kept
    assert on_device.bytes_moved_replay == 61 * layer  # for both branches, and the first layer once more
    assert on_host.bytes_moved == on_disk.bytes_moved == kept + 61 * layer
    one_branch = cost(KVLockConfig(branches="cond"), store=Store(place="host"))
    assert (one_branch.bytes_moved, one_branch.bytes_moved_replay) == (kept + 31 * layer, 31 * layer)
    joint = WAN_1_3B._replace(joint_branches=True)
    assert cost(store=Store(place="host"), model=joint).bytes_moved == kept + 31 * layer
    one = {"config": KVLockConfig(fusion="full", branches="cond"), "kernel": "backend"}
    assert cost(**one).bytes_kept == cost(**one).bytes_full
    assert cost(**one, model=joint).bytes_kept == kept  # the other branch of the call needs its own rows
    assert cost(KVLockConfig(source="batch"), model=joint).forwards == cost(model=joint).forwards == 120
    assert cost(KVLockConfig(layers=(3, 5)), store=Store(place="host")).bytes_moved_replay == 2 * layer  # they stay
    assert cost(KVLockConfig(layers=(3,)), store=Store(place="host")).bytes_device == kept // 30
    assert cost(preset("plain"), store=Store(place="host")).bytes_recording == 0
