"""Which way a call of kv_lerp_attention goes on which GPU."""

from typing import Any

import pytest
import torch
from samples import int32, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical

from kvlock_kernels import kv_lerp_attention, reference


def arguments(tokens: int = 70, dim: int = 32, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    q, k, v = (normal(1, tokens, 2, dim, seed=seed, dtype=dtype) for seed in range(3))
    sources = [normal(1, 2, 2, dim, seed=seed, dtype=dtype) for seed in (3, 4)]
    return [q, k, v, *sources, int32(5, 1), torch.tensor([0.3])]


@pytest.fixture
def way_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The way a call goes on a GPU of a compute capability; it does not go it."""
    from kvlock_kernels._triton import attend

    gone: list[str] = []
    monkeypatch.setattr(attend, "attend_in_loop", lambda q, *args, **options: (gone.append("in loop"), q))
    monkeypatch.setattr(attend, "lerp_then_attend_", lambda q, *args, **options: gone.append("lerp first"))

    def call(capability: tuple[int, int], args: list[torch.Tensor], **options: Any) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        attend.kv_lerp_attention(*args, **({"scale": 0.1} | options))
        return gone.pop()

    return call


def test_few_keys_are_mixed_in_the_loop_before_hopper_and_never_on_it(way_of: Any) -> None:
    assert way_of((8, 0), arguments(1024)) == way_of((8, 9), arguments(70)) == "in loop"
    assert way_of((8, 0), arguments(1025)) == way_of((9, 0), arguments(70)) == way_of((12, 0), arguments(70))
    assert way_of((9, 0), arguments(70)) == "lerp first"


def test_the_log_sum_exp_is_had_in_the_loop_only(way_of: Any) -> None:
    assert way_of((9, 0), arguments(2000), return_lse=True) == "in loop"


def test_what_the_loop_does_not_take_is_mixed_first(way_of: Any) -> None:
    q, k, *rest = arguments()
    assert way_of((8, 0), arguments(dim=160)) == "lerp first"
    assert way_of((8, 0), [q.float(), k, *rest]) == "lerp first"
    assert way_of((8, 0), arguments(), scale=-1.0) == "lerp first"


@pytest.mark.parametrize("implementation", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_keys_and_values_stay_as_they_are_where_they_are_mixed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlock_kernels._triton import attend

    monkeypatch.setattr(attend, "IN_LOOP", dict.fromkeys(attend.IN_LOOP, 0))
    args = arguments()
    before = [arg.clone() for arg in args]
    out = kv_lerp_attention(*args).out
    for arg, kept in zip(args, before, strict=True):
        assert_bit_identical(arg, kept)
    exact, _ = reference.kv_lerp_attention(*(x.float() if x.is_floating_point() else x for x in args), scale=32**-0.5)
    native, _ = reference.kv_lerp_attention(*args, scale=32**-0.5)
    assert_as_accurate_as_torch(out, native, exact.double())
