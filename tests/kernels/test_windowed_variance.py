"""windowed_variance_: variance over the last W clean samples, from a ring that is rewritten in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import orders
from refusals import Bad, assert_refused, bad_inputs
from samples import DTYPES, NAN, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings
from torch import Tensor

from kvlock_kernels import reference, windowed_variance_

EACH_IMPLEMENTATION = True

# W, shape of x0
RINGS = {
    "W2-B1-N5": (2, (1, 5)),
    "W10-B2-C3-T5-h4-w6": (10, (2, 3, 5, 4, 6)),
    "W3-B16-scalars": (3, (16,)),
    "W1-B2-N5-never-two-entries": (1, (2, 5)),
    "W3-B2-N2501-several-blocks-tail": (3, (2, 2501)),
    "W17-B1-N300-a-loop-over-the-slots": (17, (1, 300)),
}


def empty_ring(slots: int, *shape: int) -> Tensor:
    return torch.full((slots, *shape), NAN)


def expected_variance(seen: list[Tensor], slots: int, weight: Tensor | None = None) -> Tensor:
    """The definition by torch.var in the dtype of `seen`, over the last `slots` entries."""
    window = torch.stack(seen[-slots:])
    return weighted_mean(variance(window), weights_of(window[0], weight))


def variance(window: Tensor) -> Tensor:
    return window.var(0) if len(window) > 1 else torch.zeros_like(window[0])


def weights_of(x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ones_like(x) if weight is None else weight.to(x.dtype).expand_as(x)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    x, weights = x.reshape(len(x), -1), weights.reshape(len(x), -1)
    return (x * weights).sum(1) / weights.sum(1)


def evaluations(seen: list[Tensor], slots: int, weight: Tensor | None = None) -> list[Tensor]:
    """The same in fp32, with slots and elements in several orders.

    A sample gives one number, the end of a long sum: torch's may be all but exact by luck. Besides, torch.var adds up
    in fp64 on a CPU. The other formulas do it in fp32, as torch.var does on a GPU, and see the entries from the newest,
    as the specification has it, which costs a rounding: the kernels' are the same, fused or not.
    """
    samples = seen[0].shape[0]
    window = torch.stack(seen[-slots:]).float()
    weights = weights_of(window[0], weight).reshape(samples, -1)
    window = window.reshape(len(window), samples, -1)
    found = []
    for order, elements in zip(orders(len(window)), orders(weights.shape[1]), strict=True):
        shuffled = window[order][..., elements]
        shifted = shuffled - window[-1][:, elements]
        for per_element in (variance(shuffled), by_deviations(shifted), by_running_sums(shifted)):
            found.append(weighted_mean(per_element, weights[:, elements]))
    return found


def by_deviations(window: Tensor) -> Tensor:
    """Twice through the entries: the mean, then the squares of what differs from it."""
    return (window - window.mean(0)).square().sum(0) / max(len(window) - 1, 1)


def by_running_sums(window: Tensor) -> Tensor:
    """Once through the entries, by Welford, as torch.var does it."""
    mean, squares = torch.zeros_like(window[0]), torch.zeros_like(window[0])
    for n, x in enumerate(window, 1):
        before = x - mean
        mean = mean + before * (1 / n)
        squares = squares + before * (x - mean)
    return squares / max(len(window) - 1, 1)


LONG = ("W3-B16-scalars", "W17-B1-N300-a-loop-over-the-slots")  # in one dtype: what is read is turned into fp32 first


@pytest.mark.parametrize(
    ("ring", "dtype"),
    [
        pytest.param(ring, dtype, id=f"{name}-{dtype}")
        for name, ring in RINGS.items()
        for dtype in (DTYPES[:1] if name in LONG else DTYPES)
    ],
)
def test_every_step_of_two_turns_of_the_ring_is_as_accurate_as_torch_var(ring: Any, dtype: torch.dtype) -> None:
    slots, shape = ring
    history, seen, actual, native, exact = empty_ring(slots, *shape), [], [], [], []
    for step in range(2 * slots + 2):
        seen.append(normal(*shape, seed=step, dtype=dtype))
        actual.append(windowed_variance_(seen[-1], history, torch.tensor(step)))
        native.append(torch.stack(evaluations(seen, slots)))
        exact.append(expected_variance([x.double() for x in seen], slots))
    assert_as_accurate_as_torch(torch.cat(actual), torch.cat(native, 1).unbind(), torch.cat(exact))


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("elements", [500, 1300], ids=["N500", "N1300-several-blocks"])
def test_a_mean_far_above_the_deviation_costs_no_accuracy(ratio: float, elements: int) -> None:
    history, seen = empty_ring(10, 2, elements), [ratio + normal(2, elements, seed=step) for step in range(13)]
    for step in range(12):
        history[step % 10] = seen[step]
    actual = windowed_variance_(seen[-1], history, torch.tensor(12))
    exact = expected_variance([x.double() for x in seen], 10)
    assert_as_accurate_as_torch(actual, evaluations(seen, 10), exact)


def test_a_constant_history_has_a_variance_of_exactly_zero() -> None:
    history, x0 = empty_ring(7, 2, 50), normal(2, 50) * 1e4
    for step in range(9):
        assert windowed_variance_(x0, history, torch.tensor(step)).tolist() == [0.0, 0.0]


def test_less_than_two_entries_give_zero_by_definition() -> None:
    history = empty_ring(4, 2, 5)
    assert windowed_variance_(normal(2, 5), history, torch.tensor(0)).tolist() == [0.0, 0.0]
    assert (windowed_variance_(normal(2, 5, seed=1), history, torch.tensor(1)) > 0).all()


def test_slots_not_written_yet_are_never_read_nor_touched() -> None:
    history = empty_ring(4, 1, 3)
    for step in range(3):
        assert windowed_variance_(normal(1, 3, seed=step), history, torch.tensor(step)).isfinite().all()
        assert history[step + 1 :].isnan().all() and history[: step + 1].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])
def test_x0_is_written_to_slot_step_modulo_w_and_the_step_stays(shape: tuple[int, ...]) -> None:
    history, step = torch.zeros(3, 1, 2), torch.full(shape, 5)
    windowed_variance_(torch.tensor([[1.5, 2.5]]), history, step)
    assert history.flatten().tolist() == [0, 0, 0, 0, 1.5, 2.5]
    assert step.shape == shape and step.tolist() in (5, [5])


def test_a_step_back_to_zero_starts_a_new_window_over_stale_slots() -> None:
    used, fresh = empty_ring(4, 2, 5), empty_ring(4, 2, 5)
    for step in range(7):
        windowed_variance_(1e3 * normal(2, 5, seed=step), used, torch.tensor(step))
    for step in range(6):
        x0 = normal(2, 5, seed=10 + step)
        expected = windowed_variance_(x0, fresh, torch.tensor(step))
        assert_bit_identical(windowed_variance_(x0, used, torch.tensor(step)), expected)
        if step == 0:
            assert expected.tolist() == [0.0, 0.0]


def test_more_blocks_than_parts_are_all_summed(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = 512 if implementation == "cuda" else 16  # in the interpreter a program takes milliseconds
    if implementation == "interpreter":
        from kvlock_kernels._triton import blocks, variance

        monkeypatch.setattr(blocks, "PARTS", parts)
        monkeypatch.setattr(variance, "PARTS", parts)
    elements = 2 * parts * 512 + 777
    x0, ring = normal(1, elements), normal(2, 1, elements, seed=1)
    x0[0, -1] = 1000.0
    exact = expected_variance([ring[0].double(), x0.double()], 2)
    native = evaluations([ring[0], x0], 2)
    assert_as_accurate_as_torch(windowed_variance_(x0, ring, torch.tensor(1)), native, exact)


def test_large_weights_do_not_overflow() -> None:
    weight = torch.full((10,), 1e37)
    history = torch.zeros(10, 1, 10)
    actual = windowed_variance_(torch.full((1, 10), 1e-3), history, torch.tensor(9), weight=weight)
    assert_within_roundings(actual, torch.tensor([1e-7]), 8)


def test_two_calls_give_the_same_bits() -> None:
    x0, ring, weight = normal(2, 2501), normal(3, 2, 2501, seed=1), normal(2501, seed=2).abs()
    one, two = (windowed_variance_(x0, ring.clone(), torch.tensor(5), weight=weight) for _ in range(2))
    assert_bit_identical(one, two)


def test_a_second_call_at_the_same_step_changes_nothing() -> None:
    """A masked and a global variance share one ring."""
    history, weight = empty_ring(3, 1, 4), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    for step in range(5):
        x0 = normal(1, 4, seed=step)
        masked = windowed_variance_(x0, history, torch.tensor(step), weight=weight)
        before = history.clone()
        everywhere = windowed_variance_(x0, history, torch.tensor(step))
        assert_bit_identical(history, before)
        assert_bit_identical(windowed_variance_(x0, history, torch.tensor(step), weight=weight), masked)
    assert everywhere != masked


@pytest.mark.parametrize("shape", [(1, 1, 5, 4, 6), (2, 1, 5, 4, 6), (4, 6)], ids=["shared", "per-sample", "frame"])
@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
def test_the_weight_selects_the_elements_that_count(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = normal(*shape, seed=99).clamp(min=0).to(dtype)
    history, seen, actual, native, exact = empty_ring(4, 2, 3, 5, 4, 6), [], [], [], []
    for step in range(6):
        seen.append(normal(2, 3, 5, 4, 6, seed=step))
        actual.append(windowed_variance_(seen[-1], history, torch.tensor(step), weight=weight))
        native.append(torch.stack(evaluations(seen, 4, weight)))
        exact.append(expected_variance([x.double() for x in seen], 4, weight))
    assert_as_accurate_as_torch(torch.cat(actual), torch.cat(native, 1).unbind(), torch.cat(exact))


@pytest.mark.parametrize(
    "shape",
    [(7, 61), (2, 1, 7, 61), (1, 3, 1, 1), (2, 3, 1, 61), (2, 1, 1, 1), ()],
    ids=["frames", "frames-per-sample", "channels", "rows-per-sample", "samples", "scalar"],
)
def test_a_broadcast_weight_is_that_of_every_element(shape: tuple[int, ...]) -> None:
    x0, ring, weight = normal(2, 3, 7, 61), normal(3, 2, 3, 7, 61, seed=1), normal(*shape, seed=2).abs()
    spelt_out = weight.expand_as(x0).contiguous()
    expected = windowed_variance_(x0, ring.clone(), torch.tensor(5), weight=spelt_out)
    assert_within_roundings(windowed_variance_(x0, ring, torch.tensor(5), weight=weight), expected, 8)


def test_the_weighted_mean_divides_by_the_weights_of_all_channels() -> None:
    history = torch.zeros(2, 1, 2, 2)
    x0 = torch.tensor([[[2.0, 100.0], [4.0, 100.0]]])  # two channels of two tokens
    weight = torch.tensor([[[1.0, 0.0]]])
    assert windowed_variance_(x0, history, torch.tensor(1), weight=weight).tolist() == [(2.0 + 8.0) / 2]


def test_weights_that_sum_to_zero_give_zero_in_their_own_sample() -> None:
    history = normal(3, 2, 4)
    actual = windowed_variance_(normal(2, 4, seed=1), history, torch.tensor(5), weight=torch.tensor([[0.0], [1.0]]))
    assert actual[0] == 0 and actual[1] > 0


def test_an_element_of_weight_zero_does_not_count_even_where_it_is_nan() -> None:
    x0, history, weight = normal(1, 4), normal(3, 1, 4, seed=1), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    expected = windowed_variance_(x0, history.clone(), torch.tensor(5), weight=weight)
    x0[0, 2] = NAN
    assert_bit_identical(windowed_variance_(x0, history, torch.tensor(5), weight=weight), expected)


def test_a_nan_stays_in_its_sample_and_leaves_with_its_slot() -> None:
    history = empty_ring(3, 2, 4)
    for step in range(8):
        x0 = normal(2, 4, seed=step)
        if step == 2:
            x0[1, 3] = NAN
        actual = windowed_variance_(x0, history, torch.tensor(step))
        assert actual.isnan().tolist() == [False, step in (2, 3, 4)]


def test_samples_are_not_mixed() -> None:
    history, alone = empty_ring(4, 2, 6), empty_ring(4, 1, 6)
    for step in range(6):
        x0 = torch.stack([torch.full((6,), 3.0), normal(6, seed=step)])
        both = windowed_variance_(x0, history, torch.tensor(step))
        one = windowed_variance_(x0[1:], alone, torch.tensor(step))
    assert both[0] == 0
    assert_bit_identical(both[1:], one)


def test_half_precision_input_is_kept_and_measured_in_fp32() -> None:
    history = empty_ring(2, 1, 1)
    for step, value in enumerate([1000.0, 1004.0]):
        actual = windowed_variance_(torch.full((1, 1), value, dtype=torch.bfloat16), history, torch.tensor(step))
    assert actual.dtype == torch.float32 and actual.item() == 8.0
    assert history.flatten().tolist() == [1000.0, 1004.0]


def test_strided_tensors_give_the_bits_of_contiguous_ones() -> None:
    ring = normal(2, 4, 3, 5)
    history, x0 = ring.transpose(0, 1), normal(5, 3, 2, seed=1).permute(2, 1, 0)
    weight = normal(5, 3, seed=2).abs().t()
    dense = history.contiguous()
    expected = windowed_variance_(x0.contiguous(), dense, torch.tensor(6), weight=weight.contiguous())
    assert_bit_identical(windowed_variance_(x0, history, torch.tensor(6), weight=weight), expected)
    assert_bit_identical(history, dense)
    assert_bit_identical(history[2], x0)


def test_a_ring_that_is_scattered_within_a_sample_is_written_in_place() -> None:
    history, x0 = normal(4, 2, 5, 3).transpose(2, 3), normal(2, 3, 5, seed=1)
    dense = history.contiguous()
    expected = windowed_variance_(x0, dense, torch.tensor(6))
    assert_within_roundings(windowed_variance_(x0, history, torch.tensor(6)), expected, 8)
    assert_bit_identical(history, dense)


def test_slots_may_lie_further_apart_than_int32_can_say(implementation: str, tmp_path: Path) -> None:
    stride, x0 = 2**31 // 9 + 1, normal(1, 5)
    if implementation == "cuda":
        memory = torch.empty(9 * stride + 5)
    else:  # a file of which only the slots take room
        memory = torch.from_file(str(tmp_path / "ring"), shared=True, size=9 * stride + 5)
    history, dense = memory.as_strided((10, 1, 5), (stride, 5, 1)), normal(10, 1, 5, seed=1)
    history.copy_(dense)
    for step in (17, 19):  # the last slot is read, then written
        expected = reference.windowed_variance_(x0, dense, torch.tensor(step))
        assert_within_roundings(windowed_variance_(x0, history, torch.tensor(step)), expected, 8)
        assert_bit_identical(history, dense)


def test_a_sample_too_large_for_the_kernels_is_left_to_the_reference() -> None:
    from kvlock_kernels._triton import Unsupported
    from kvlock_kernels._triton.blocks import Blocks

    with pytest.raises(Unsupported, match="2147483648 elements"):
        Blocks.of(torch.empty(1, 2**31, device="meta"), 512)


def test_an_empty_sample_gives_zero_and_no_samples_give_an_empty_result() -> None:
    assert windowed_variance_(torch.empty(2, 0), torch.empty(3, 2, 0), torch.tensor(4)).tolist() == [0.0, 0.0]
    assert windowed_variance_(torch.empty(0, 5), torch.empty(3, 0, 5), torch.tensor(4)).shape == (0,)


@bad_inputs(
    Bad({"x0": 1.0}, "x0", "float 1.0", "a tensor"),
    Bad({"x0": torch.zeros(2, 4).double()}, "x0", "dtype float64", "dtype float32"),
    Bad({"x0": torch.tensor(1.0)}, "x0", "shape []", "[B, ...]"),
    Bad({"history": torch.zeros(3, 2, 4).half()}, "history", "dtype float16", "dtype float32"),
    Bad({"history": torch.zeros(3, 1, 4)}, "history", "shape [3, 1, 4]", "[W >= 1, 2, 4]"),
    Bad({"history": torch.zeros(2, 4)}, "history", "shape [2, 4]", "[W >= 1, 2, 4]"),
    Bad({"history": torch.zeros(0, 2, 4)}, "history", "shape [0, 2, 4]", "[W >= 1, 2, 4]"),
    Bad({"history": torch.zeros(1, 2, 4).expand(3, 2, 4)}, "history", "expanded", "can be written"),
    Bad({"history": torch.zeros(3, 2, 4, device="meta")}, "history", "device meta", "device cpu"),
    Bad({"step": 3}, "step", "int 3", "a tensor"),
    Bad({"step": torch.tensor(3, dtype=torch.int32)}, "step", "dtype int32", "dtype int64"),
    Bad({"step": torch.tensor([3, 3])}, "step", "shape [2]", "[] or [1]"),
    Bad({"weight": torch.ones(2, 4, dtype=torch.int64)}, "weight", "dtype int64", "dtype bool or float32"),
    Bad({"weight": torch.ones(2, 3)}, "weight", "shape [2, 3]", "broadcasts to [2, 4]"),
    Bad({"weight": torch.ones(1, 2, 4)}, "weight", "shape [1, 2, 4]", "broadcasts to [2, 4]"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    good = {"x0": torch.zeros(2, 4), "history": torch.zeros(3, 2, 4), "step": torch.tensor(1), "weight": None}
    assert_refused(windowed_variance_, good, bad)
