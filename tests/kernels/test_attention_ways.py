"""The ways to attend to mixed keys and values: each against the definition, and what must hold bit for bit."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from evaluations import attentions, log_sum_exps
from regimes import FP8, INT8, STREAMING, each_regime, every, rows_of, sources_of_values
from samples import DTYPES, NAN, normal, packed, source_rows
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings
from torch import Tensor

from kvlock_kernels import reference

IMPLEMENTED = ("interpreter", pytest.param("cuda", marks=pytest.mark.gpu))
pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTED, indirect=True)

AXES: dict[str, Any] = {
    "queries": (1, 45, 128, 200, 257),
    "tokens": (1, 45, 128, 200, 257),
    "dim": (32, 64, 96, 128),
    "heads": (1, 2),
    "ratio": (0.0, 0.3, 1.0),
    "share": (0.0, 0.4, 1.0),
    "dtype": DTYPES,
    "source": STREAMING["source"],
    "samples": ((1, 1), (2, 1), (2, 2)),
    "contiguous": (True, False),
}


def in_loop(*args: Tensor, **options: Any) -> Tensor:
    from kvlock_kernels._triton.in_loop import attend_in_loop

    return attend_in_loop(*args, **options)[0]


def lerp_then_attend(*args: Tensor, **options: Any) -> Tensor:
    from kvlock_kernels._triton.attend import lerp_then_attend_

    return lerp_then_attend_(*args, **options)


def persistent(*args: Tensor, **options: Any) -> Tensor:
    from kvlock_kernels._triton.persistent import attend_persistently_

    return attend_persistently_(*args, **options)


Way = Callable[..., Tensor]
KERNELS = (in_loop, persistent)
each_way = pytest.mark.parametrize("way", (*KERNELS, lerp_then_attend))
each_kernel = pytest.mark.parametrize("way", KERNELS)


def call_of(regime: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """The arguments and options of one call."""
    (b, sources), (source_dtype, mean) = regime["samples"], regime["source"]
    m, n, h, d, dtype = (regime[name] for name in ("queries", "tokens", "heads", "dim", "dtype"))
    q, k, v = (normal(b, x, 2, h, d, seed=i, dtype=dtype)[:, :, 1] for i, x in enumerate((m, n, n)))
    if regime["contiguous"]:
        q, k, v = q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2), v.contiguous()
    index, _ = rows_of(n, regime["share"])
    k_source, k_options, _ = source_rows(source_dtype, sources, len(index), h, d, mean=mean, seed=3)
    sources, source_dtype, mean = sources_of_values(regime)
    v_source, v_options, _ = source_rows(source_dtype, sources, len(index), h, d, mean=mean, seed=4)
    options = {name.replace("source", "k"): value for name, value in k_options.items()}
    options |= {name.replace("source", "v"): value for name, value in v_options.items()}
    ratio = torch.tensor([regime["ratio"], 0.77])[:b]
    return [q, k, v, k_source, v_source, index, ratio], options | {"scale": d**-0.5}


def mixed(args: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q with keys and values as the definition mixes them."""
    q, k, v, *rest = args
    k, v = k.clone(), v.clone()
    reference.kv_lerp_pair_(k, v, *rest, **{name: value for name, value in options.items() if name != "scale"})
    return q, k, v


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by torch in the dtype of its arguments."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def assert_right(way: Way, regime: dict[str, Any]) -> None:
    args, options = call_of(regime)
    qkv = mixed(args, options)
    exact = attended(*(x.double() for x in qkv), options["scale"])
    assert_as_accurate_as_torch(way(*args, **options), attentions(*qkv, options["scale"]), exact)


@each_way
@each_regime(AXES)
def test_a_way_is_as_accurate_as_torch_on_mixed_keys_and_values(way: Way, regime: dict[str, Any]) -> None:
    assert_right(way, regime)


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", AXES["dim"])
def test_every_combination_is_as_accurate(way: Way, dim: int, dtype: torch.dtype) -> None:
    """Of what changes the values of a head: two samples, one head, strided tensors."""
    fixed = {"heads": (1,), "samples": ((2, 1),), "contiguous": (False,), "dim": (dim,), "dtype": (dtype,)}
    for regime in every(AXES | fixed):
        assert_right(way, regime)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_sum_exp_is_that_of_the_scaled_scores(dtype: torch.dtype) -> None:
    from kvlock_kernels._triton.in_loop import attend_in_loop

    args, options = call_of(REGIME | {"dtype": dtype})
    _, lse = attend_in_loop(*args, **options, return_lse=True)
    q, k, _ = mixed(args, options)
    exact = (options["scale"] * torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double())).logsumexp(-1)
    assert_as_accurate_as_torch(lse, log_sum_exps(q, k, options["scale"]), exact)


REGIME: dict[str, Any] = {
    "queries": 45,
    "tokens": 130,
    "dim": 32,
    "heads": 2,
    "ratio": 0.3,
    "share": 0.4,
    "dtype": torch.float16,
    "source": (torch.float16, False),
    "samples": (2, 1),
    "contiguous": False,
}


@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_zero_is_attention_without_rows_bit_for_bit(way: Way, dtype: torch.dtype) -> None:
    (q, k, v, k_source, _, index, ratio), options = call_of(REGIME | {"dtype": dtype})
    none = k_source[:, :0]
    plain = way(q, k.clone(), v.clone(), none, none, index[:0], ratio, scale=options["scale"])
    poison = torch.full_like(k_source, NAN)
    zero = torch.tensor([0.0, -0.0])
    assert_bit_identical(way(q, k, v, poison, poison, index, zero, scale=options["scale"]), plain)


@each_way
def test_ratio_one_does_not_depend_on_the_locked_keys_and_values(way: Way) -> None:
    (q, k, v, k_source, v_source, index, _), options = call_of(REGIME)
    one = torch.ones(2)
    expected = way(q, k.clone(), v.clone(), k_source, v_source, index, one, **options)
    k[:, index.long()], v[:, index.long()] = NAN, NAN
    assert_bit_identical(way(q, k, v, k_source, v_source, index, one, **options), expected)


@each_way
def test_the_order_of_rows_does_not_matter(way: Way) -> None:
    (q, k, v, k_source, v_source, index, ratio), options = call_of(REGIME)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1), device="cpu").to(index.device)
    expected = way(q, k.clone(), v.clone(), k_source, v_source, index, ratio, **options)
    options["v_scale"] = options["v_scale"][:, order]  # values come in 8 bits here
    actual = way(q, k, v, k_source[:, order], v_source[:, order], index[order], ratio, **options)
    assert_bit_identical(actual, expected)


@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_background_rows_may_change_places_with_their_source_rows(way: Way, dtype: torch.dtype) -> None:
    (q, k, v, k_source, v_source, index, ratio), options = call_of(REGIME | {"dtype": dtype})
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1), device="cpu").to(index.device)
    rows = index.long()
    moved = [x.clone() for x in (k, v)]
    for x, y in zip((k, v), moved, strict=True):
        y[:, rows] = x[:, rows[order]]
    expected = way(q, k.clone(), v.clone(), k_source, v_source, index, ratio, **options)
    options["v_scale"] = options["v_scale"][:, order]  # values come in 8 bits here
    actual = way(q, *moved, k_source[:, order], v_source[:, order], index, ratio, **options)
    assert not torch.equal(moved[0], k)
    assert_within_roundings(actual, expected, 4)


@each_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_vanish(way: Way, dtype: torch.dtype) -> None:
    (q, k, *rest), options = call_of(REGIME | {"dtype": dtype, "source": (dtype, False)})
    rest[-1].fill_(0)  # the definition below has the plain keys
    q, k = q * 100, k * 100
    scores = options["scale"] * torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float())
    assert scores.max() > 1e4 and scores.min() < -1e4
    exact = attended(*(x.double() for x in (q, k, rest[0])), options["scale"])
    # One key has all the weight, so that torch gives its value without an error. A GPU multiplies and subtracts in one
    # rounding, which leaves a weight near 1 to be rounded, and the result after it.
    assert_within_roundings(way(q, k, *rest, **options), exact.to(dtype), 2)


@each_way
def test_a_nan_ratio_gives_nan_in_its_own_sample_only(way: Way) -> None:
    args, options = call_of(REGIME)
    args[-1][0] = NAN
    out = way(*args, **options)
    assert out[0].isnan().all() and out[1].isfinite().all()


@each_way
def test_no_queries_and_no_samples_give_empty_results(way: Way) -> None:
    (q, k, v, *rest), options = call_of(REGIME | {"source": (torch.float16, False), "samples": (1, 1)})
    assert way(q[:, :0], k, v, *rest, **options).shape == (1, 0, 2, 32)
    assert way(q[:0], k[:0], v[:0], *rest[:3], rest[3][:0], **options).shape == (0, 45, 2, 32)


def test_more_heads_than_a_grid_has_rows_are_served() -> None:
    """65535 is where every axis of a grid ends but the first."""
    from kvlock_kernels._triton import in_loop as module

    q, none = torch.zeros(2, 1, 35000, 1), torch.zeros(1, 0, 35000, 1)
    with mock.patch.object(module, "in_loop_kernel", mock.MagicMock()) as kernel:
        in_loop(q, q, q, none, none, torch.zeros(0, dtype=torch.int32), torch.ones(2), scale=1.0)
    (grid,) = kernel.__getitem__.call_args.args
    assert math.prod(grid) == 70000 and max(grid[1:], default=1) <= 65535


@each_kernel
def test_what_the_kernels_cannot_take_is_refused_before_anything_is_written(way: Way) -> None:
    from kvlock_kernels._triton import Unsupported

    args, options = call_of(REGIME)
    before = args[1].clone()
    for change, reason in (
        ({"scale": -1.0}, "scale -1.0"),
        ({0: args[0].float()}, "queries of torch.float32 and keys of torch.float16"),
        ({i: normal(2, 130 if i else 45, 2, 160, dtype=torch.float16) for i in range(3)}, "head dimension 160"),
    ):
        changed = [change.get(i, arg) for i, arg in enumerate(args)]
        with pytest.raises(Unsupported, match=reason):
            way(*changed, **(options | {name: x for name, x in change.items() if isinstance(name, str)}))
    assert_bit_identical(args[1], before)


def test_packed_rows_are_decoded_as_the_lerp_does() -> None:
    """What `kv_lerp_` would leave in k and v, attended to by the same kernel."""
    (q, k, v, *_, index, ratio), options = call_of(REGIME)
    k_source, k_scale, k_mean = packed(INT8, 1, len(index), 2, 32, seed=3, mean=True)
    v_source, v_scale, v_mean = packed(FP8, 2, len(index), 2, 32, seed=4, mean=True)
    scales = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "v_mean": v_mean}
    rows = [k_source, v_source, index, ratio]
    _, k_mixed, v_mixed = mixed([q, k, v, *rows], scales)
    none = torch.empty(1, 0, 2, 32, dtype=torch.float16)
    expected = in_loop(q, k_mixed, v_mixed, none, none, index[:0], ratio, scale=options["scale"])
    assert_bit_identical(in_loop(q, k, v, *rows, **scales, scale=options["scale"]), expected)
    assert math.isfinite(expected.float().sum())
