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
    from kvlock_kernels._triton import attend, hopper

    gone: list[str] = []

    def noted(name: str) -> Any:
        return lambda q, *args, **options: (gone.append(name), q)

    monkeypatch.setattr(attend, "attend_in_loop", noted("in loop"))
    monkeypatch.setattr(attend, "kv_lerp_pair_", lambda *args, **options: None)
    monkeypatch.setattr(attend, "OWN", {32: 1000})
    monkeypatch.setattr(hopper, "attention", noted("own kernel"))
    monkeypatch.setattr(attend.F, "scaled_dot_product_attention", lambda *args, **options: noted("torch")(*args)[1])

    def call(capability: tuple[int, int], args: list[torch.Tensor], **options: Any) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        attend.kv_lerp_attention(*args, **({"scale": 0.1} | options))
        return gone.pop()

    return call


def test_many_keys_go_to_the_own_kernel_on_the_gpu_it_is_made_for(way_of: Any) -> None:
    assert way_of((9, 0), arguments(1000)) == "own kernel"
    assert way_of((9, 0), arguments(999)) == "torch"
    assert way_of((9, 0), arguments(1000, dim=64)) == "torch"
    assert {way_of(capability, arguments(1000)) for capability in ((8, 0), (8, 9), (10, 0), (12, 0))} == {"torch"}


def test_what_the_own_kernel_does_not_take_goes_to_torch(way_of: Any) -> None:
    q, k, *rest = arguments(1000)
    assert way_of((9, 0), arguments(1000, dtype=torch.float32)) == "torch"
    assert way_of((9, 0), [q.float(), k, *rest]) == "torch"
    assert way_of((9, 0), arguments(1000), scale=-1.0) == "torch"


def test_the_log_sum_exp_comes_from_a_kernel_that_gives_it(way_of: Any) -> None:
    assert way_of((9, 0), arguments(70), return_lse=True) == "own kernel"
    assert way_of((9, 0), arguments(70, dtype=torch.float32), return_lse=True) == "in loop"
    assert way_of((8, 0), arguments(2000), return_lse=True) == "in loop"


@pytest.mark.parametrize("implementation", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("own", [{}, {32: 1}], ids=["torch", "own-kernel"])
def test_keys_and_values_stay_as_they_are(
    own: dict[int, int], return_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlock_kernels._triton import attend

    monkeypatch.setattr(attend, "OWN", own)
    args = arguments()
    before = [arg.clone() for arg in args]
    out = kv_lerp_attention(*args, return_lse=return_lse).out
    for arg, kept in zip(args, before, strict=True):
        assert_bit_identical(arg, kept)
    exact, _ = reference.kv_lerp_attention(*(x.float() if x.is_floating_point() else x for x in args), scale=32**-0.5)
    native, _ = reference.kv_lerp_attention(*args, scale=32**-0.5)
    assert_as_accurate_as_torch(out, native, exact.double())
