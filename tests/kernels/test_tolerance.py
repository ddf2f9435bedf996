"""The tolerance of the kernel tests: what it lets pass and what it does not."""

import pytest
import torch
from tolerance import assert_as_accurate_as_torch
from torch import Tensor


def off_by(steps: int) -> Tensor:
    return torch.tensor([1.0, 1.0 + steps * torch.finfo(torch.float32).eps])


def test_twice_the_error_of_torch_passes_and_no_more() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    assert_as_accurate_as_torch(off_by(2), off_by(1), exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(3), off_by(1), exact)


def test_what_torch_has_exact_by_luck_may_be_off_by_the_roundings_that_a_test_asks_for() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(1), off_by(0), exact)
    assert_as_accurate_as_torch(off_by(1), off_by(0), exact, roundings=1)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as_torch(off_by(2), off_by(0), exact, roundings=1)
