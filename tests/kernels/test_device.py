"""Every operator once, small, on each implementation of its kernels: what a memory checker is run on."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from samples import CALLS, DTYPES, Call
from serving import ON_CUDA, triton_on_cuda
from tolerance import assert_bit_identical, assert_within_roundings
from torch.utils._pytree import tree_leaves

import kvlock_kernels

ROUNDINGS = 8  # of the largest value: the sums run in other orders


def interpreted() -> contextlib.AbstractContextManager[None]:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU")
    import interpreter

    return interpreter.kernels_on_cpu()


@contextlib.contextmanager
def triton() -> Iterator[None]:
    with torch.device("cuda"), triton_on_cuda():
        yield


PLACES = {"interpreter": interpreted, "cuda": lambda: torch.device("cuda"), "triton": triton}
RUNS = [
    pytest.param(place, *call, id=f"{at}-{of}", marks=[pytest.mark.gpu] * (at != "interpreter"))
    for at, place in PLACES.items()
    for of, call in CALLS.items()
    if at != "triton" or call[0] in ON_CUDA  # elsewhere the kernels serve CUDA already
]


def tensors(name: str, call: Call) -> list[torch.Tensor]:
    """Results, and the arguments afterwards."""
    result = getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
    return [leaf for leaf in tree_leaves((result, tuple(call))) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(("place", "name", "make"), RUNS)
def test_an_operator_gives_what_the_reference_gives(
    place: Callable[[], contextlib.AbstractContextManager[None]], name: str, make: Callable[[], Call]
) -> None:
    expected = tensors(name, make())
    with place():
        found, again = tensors(name, make()), tensors(name, make())
    for one, other in zip(found, again, strict=True):
        assert_bit_identical(one, other)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == wanted.dtype
        if actual.dtype in DTYPES:
            assert_within_roundings(actual.cpu(), wanted, ROUNDINGS)
        else:
            assert_bit_identical(actual.cpu(), wanted)
