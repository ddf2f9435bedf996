"""The one author of tolerances: as accurate as torch itself in the dtype of the result."""

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_as_accurate_as_torch(actual: Tensor, native: Tensor | Iterable[Tensor], exact: Tensor) -> None:
    """Wants the error of `actual` to be at most twice torch's.

    `native` is the same formula by plain torch in the dtype of `actual`, `exact` the same in float64 from the same
    inputs. Errors are largest absolute differences. Where torch may be all but exact by luck, in one sum for example,
    a test gives several evaluations of the formula, see `evaluations`: torch's error is the largest of theirs, of which
    no more are asked for than it takes.
    """
    natives = [native] if isinstance(native, Tensor) else native
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    error, allowed = largest_error(actual, exact), 0.0
    for one in natives:
        assert one.shape == actual.shape and one.dtype == actual.dtype
        allowed = max(allowed, 2 * largest_error(one, exact))
        if error <= allowed:
            return
    raise AssertionError(f"error {error:.3e}, allowed {allowed:.3e}")


def largest_error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def assert_within_roundings(actual: Tensor, expected: Tensor, roundings: int) -> None:
    """Wants `actual` off by at most as many roundings to its dtype, each of the largest finite expected value.

    For what has no formula in torch to be measured against: a number known beforehand, or the same operator by another
    way. NaN and infinities must be where they are expected.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual.nan_to_num()[~finite], expected.nan_to_num()[~finite])
    if not finite.any():
        return
    error = (actual - expected)[finite].abs().max().item()
    allowed = roundings * torch.finfo(actual.dtype).eps * expected[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_sums_differ_at_most(actual: Tensor, expected: Tensor) -> None:
    """Bit-identical, but that each kernel adds up the squares of a token in the order of its own threads."""
    wanted = expected.float()
    allowed = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
    if expected.dtype != torch.float32:
        allowed = allowed + torch.finfo(expected.dtype).eps * wanted.abs()  # such a difference may round the other way
    assert ((actual.float() - wanted).abs() <= allowed).all()


def assert_bit_identical(actual: Tensor, expected: Tensor) -> None:
    """Wants the same shape, dtype and bits, the sign of zero and the payload of NaN included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def bits(x: Tensor) -> Tensor:
    """The bytes of x, row-major."""
    return x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
