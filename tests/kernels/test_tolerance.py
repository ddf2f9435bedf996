"""The tolerance of the kernel tests: what it lets pass and what it does not."""

from collections.abc import Callable

import pytest
import torch
from evaluations import draws, log_sum_exps, orders
from samples import normal
from tolerance import assert_as_accurate_as_torch
from torch import Tensor


def off_by(steps: int) -> Tensor:
    return torch.tensor([1.0, 1.0 + steps * torch.finfo(torch.float32).eps])


def test_twice_the_error_of_torch_passes_and_no_more() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    assert_as_accurate_as_torch(off_by(2), off_by(1), exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(3), off_by(1), exact)


def test_what_torch_has_exact_must_be_exact() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    assert_as_accurate_as_torch(off_by(0), off_by(0), exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(1), off_by(0), exact)


def test_of_several_evaluations_the_largest_error_is_that_of_torch() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    natives = [off_by(0), off_by(-2), off_by(1)]
    assert_as_accurate_as_torch(off_by(4), natives, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(5), natives, exact)


def test_an_evaluation_in_another_dtype_or_shape_is_none() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    for other in (off_by(1).bfloat16(), off_by(1)[:1]):
        with pytest.raises(AssertionError):
            assert_as_accurate_as_torch(off_by(1), [other, off_by(1)], exact)


def test_an_order_has_every_term_once_and_differs_from_the_others() -> None:
    found = orders(100)
    assert all(order.sort().values.tolist() == list(range(100)) for order in found)
    assert found[0].tolist() == list(range(100)) and len({tuple(order.tolist()) for order in found}) == len(found)


def test_repeats_give_enough_numbers() -> None:
    assert [len(draws(numbers)) for numbers in (1, 6, 63, 64, 1000)] == [64, 11, 2, 1, 1]


def to_tf32(x: Tensor) -> Tensor:
    """Rounds fp32 to the ten bits of a mantissa that tensor cores keep."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("coarser", [to_tf32, lambda x: x.bfloat16().float()], ids=["tf32", "bf16"])
def test_a_sum_of_coarser_factors_is_less_accurate_than_any_order(
    coarser: Callable[[Tensor], Tensor], seed: int
) -> None:
    x, y = normal(2, 300, seed=2 * seed), normal(2, 300, seed=2 * seed + 1)
    exact = (x.double() * y.double()).sum(1)
    natives = [(x * y)[:, order].sum(1) for order in orders(300)]
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch((coarser(x) * coarser(y)).sum(1), natives, exact)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [1, 45])
def test_a_log_sum_exp_that_is_further_off_or_of_coarser_factors_is_refused(tokens: int, seed: int) -> None:
    q, k = normal(2, 20, 3, 24, seed=2 * seed), normal(2, tokens, 3, 24, seed=2 * seed + 1)
    exact = (0.2 * torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double())).logsumexp(-1)
    natives = log_sum_exps(q, k, 0.2)
    assert all(one.dtype == torch.float32 for one in natives)
    worst = max((one - exact).abs().max() for one in natives)
    assert_as_accurate_as_torch((exact + 1.5 * worst).float(), natives, exact)
    bad = (exact + 2.5 * worst).float(), log_sum_exps(to_tf32(q), to_tf32(k), 0.2)[0]
    for one in bad:
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate_as_torch(one, natives, exact)
