"""qk_norm_rope_kv_lerp_: QK norm, RoPE and the lock in one pass."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluations import draws, orders
from refusals import Bad, assert_refused, bad_inputs
from regimes import STREAMING, each_regime, rows_of, sources_of_values
from samples import DTYPES, NAN, int32, nan_with_payload, normal, packed, projections, source_rows
from tolerance import (
    assert_as_accurate_as_torch,
    assert_bit_identical,
    assert_sums_differ_at_most,
    assert_within_roundings,
)
from torch import Tensor

from kvlock_kernels import kv_lerp_, qk_norm_rope_kv_lerp_, reference, unpack_kv

EACH_IMPLEMENTATION = True

EPS = 1e-6
REGIMES = STREAMING | {"dim": (24, 32, 64, 128), "heads": (1, 2)}  # odd widths and wide heads come further down
INT8, FP8 = torch.int8, torch.float8_e4m3fn
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_packing = pytest.mark.parametrize("packing", [INT8, FP8], ids=["int8", "fp8"])

# B, Bs, N, rows, H, D
SHAPES = {
    "B1-N45-H2-D32-several-tokens-a-tile": (1, 1, 45, 19, 2, 32),
    "B2-N9-H12-D128-one-token-a-tile": (2, 1, 9, 5, 12, 128),
    "B2-N130-H3-D24-odd-heads-D-below-64": (2, 2, 130, 130, 3, 24),
    "B2-N1-H4-D64-one-token": (2, 1, 1, 1, 4, 64),
    "B1-N3-H40-D128-sixteen-warps": (1, 1, 3, 2, 40, 128),
    "B1-N5-H3-D256-the-largest-heads": (1, 1, 5, 3, 3, 256),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def normed(x: Tensor, weight: Tensor, order: Tensor | None = None) -> Tensor:
    """The norm, perhaps with the squares of a token added up in this order."""
    order = torch.arange(x.shape[-1]) if order is None else order
    return F.rms_norm(x[..., order], x.shape[-1:], weight[order], EPS)[..., order.argsort()]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by complex numbers: another road than the reference's, in the dtype of x or fp32 for half precision."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(2, (-1, cos.shape[1] // 2, 2)).contiguous())
    turn = torch.complex(cos[:, 0::2].to(wide.dtype), sin[:, 1::2].to(wide.dtype))
    return torch.view_as_real(pairs * turn[:, None]).flatten(2).to(x.dtype)


def rotated_in_steps(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by real numbers in fp32, each product rounded: complex ones may round a product and a sum at once."""
    first, second = x.float().unflatten(2, (-1, cos.shape[1] // 2, 2)).unbind(-1)
    c, s = cos[:, None, 0::2], sin[:, None, 1::2]
    return torch.stack([first * c - second * s, first * s + second * c], -1).flatten(2).to(x.dtype)


def step_by_step(
    args: tuple[Tensor, ...],
    rows: tuple[Tensor, Tensor],
    index: Tensor,
    ratio: Tensor,
    order: Tensor | None = None,
    turn: Callable[[Tensor, Tensor, Tensor], Tensor] = rotated,
) -> list[Tensor]:
    """Norm, lerp and RoPE one after the other, as torch computes them in the dtype of the arguments."""
    q, k, v, q_weight, k_weight, cos, sin = args
    k, v, where = normed(k, k_weight, order).clone(), v.clone(), index.long()
    for x, source in zip((k, v), rows, strict=True):
        a, source = ratio.to(x.dtype).reshape(-1, 1, 1), source.flatten(2).to(x.dtype)
        x[:, where] = (1 - a) * x[:, where] + a * source
    return [turn(normed(q, q_weight, order), cos, sin), turn(k, cos, sin), v]


def evaluations(*args: Any) -> list[tuple[Tensor, ...]]:
    """All of q, of k and of v with the squares in several orders and both ways to turn.

    All elements of a token rest on one sum of squares: one or two may be all but exact by luck, and of many the order
    decides which of the largest elements are furthest off.
    """
    b, n, c = args[0][0].shape
    ways = itertools.product(orders(c, max(8, len(draws(b * n)))), (rotated, rotated_in_steps))
    return list(zip(*(step_by_step(*args, order, turn) for order, turn in ways), strict=True))


@each_shape
@each_dtype
def test_the_pass_is_as_accurate_as_norm_lerp_and_rope_in_torch(shape: Any, dtype: torch.dtype) -> None:
    b, bs, n, rows, h, d = shape
    args, (index, source_row) = projections(b, n, h, d, dtype), rows_of(n, rows / n)
    sources = normal(bs, rows, h, d, seed=6, dtype=dtype), normal(bs, rows, h * d, seed=7, dtype=dtype)
    ratio = torch.tensor([0.3, 0.77])[:b]
    native = evaluations(args, sources, index, ratio)
    exact = step_by_step(tuple(x.double() for x in args), tuple(x.double() for x in sources), index, ratio.double())
    q, k, v, *rest = args
    actual = qk_norm_rope_kv_lerp_(q, k, v, *rest, *sources, source_row, ratio, eps=EPS)
    for one, by_torch, wanted in zip(actual, native, exact, strict=True):
        assert_as_accurate_as_torch(one, by_torch, wanted)


@each_regime(REGIMES)
def test_the_pass_agrees_with_norm_lerp_and_rope_in_torch(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, sources), (source_dtype, mean) = regime["samples"], regime["source"]
    q, k, v, *rest = projections(b, n, h, d, dtype)
    if not regime["contiguous"]:  # each with strides of its own
        q, k = torch.stack([q, k, v], 2)[:, :, 0], torch.stack([q, k], 2)[:, :, 1]
    (index, source_row), ratio = rows_of(n, regime["share"]), torch.tensor([regime["ratio"], 0.77])[:b]
    k_source, k_options, k_decoded = source_rows(source_dtype, sources, len(index), h, d, mean=mean)
    sources, source_dtype, mean = sources_of_values(regime)
    v_source, v_options, v_decoded = source_rows(source_dtype, sources, len(index), h, d, mean=mean, seed=2)
    options = {name.replace("source", "k"): value for name, value in k_options.items()}
    options |= {name.replace("source", "v"): value for name, value in v_options.items()}
    rows = (
        reference.decode(k_source, options.get("k_scale"), options.get("k_mean")).to(dtype),
        reference.decode(v_source, options.get("v_scale"), options.get("v_mean")).to(dtype),
    )
    native = evaluations((q, k, v, *rest), rows, index, ratio)
    exact = step_by_step(tuple(x.double() for x in (q, k, v, *rest)), (k_decoded, v_decoded), index, ratio.double())
    actual = qk_norm_rope_kv_lerp_(q, k, v, *rest, k_source, v_source, source_row, ratio, eps=EPS, **options)
    for one, by_torch, wanted in zip(actual, native, exact, strict=True):
        assert_as_accurate_as_torch(one, by_torch, wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_results_are_rounded_once(dtype: torch.dtype) -> None:
    """A second rounding, after the norm or after the lerp, would give another neighbour for every third number."""
    args, (index, source_row) = projections(2, 45, 3, 24, dtype), rows_of(45, 19 / 45)
    sources, ratio = [normal(2, 19, 3, 24, seed=seed, dtype=dtype) for seed in (6, 7)], torch.tensor([0.3, 0.77])
    exact = step_by_step(tuple(x.double() for x in args), tuple(x.double() for x in sources), index, ratio.double())
    actual = qk_norm_rope_kv_lerp_(*args, *sources, source_row, ratio, eps=EPS)
    for one, wanted in zip(actual, exact, strict=True):
        others = (one != wanted.to(dtype)).double().mean().item()
        assert others <= 0.01, f"{others:.1%} are not the nearest number"


@each_packing
@pytest.mark.parametrize("mean", [False, True], ids=["no-mean", "mean"])
def test_packed_rows_are_mixed_as_their_decoded_values(packing: torch.dtype, mean: bool) -> None:
    b, n, rows, h, d = 2, 21, 13, 3, 24
    args, (_, source_row), ratio = projections(b, n, h, d), rows_of(n, rows / n), torch.tensor([0.3, 1.0])
    k_data, k_scale, k_mean = packed(packing, 1, rows, h, d, seed=6, mean=mean)
    v_data, v_scale, v_mean = packed(packing, b, rows, h, d, seed=7, mean=mean)
    expected = qk_norm_rope_kv_lerp_(
        *(x.clone() for x in args[:3]),
        *args[3:],
        unpack_kv(k_data, k_scale, mean=k_mean),
        unpack_kv(v_data, v_scale, mean=v_mean),
        source_row,
        ratio,
        eps=EPS,
    )
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "v_mean": v_mean, "eps": EPS}
    *actual, v = qk_norm_rope_kv_lerp_(*args, k_data, v_data, source_row, ratio, **options)
    assert_bit_identical(v, expected[2])
    for one, other in zip(actual, expected[:2], strict=True):
        assert_sums_differ_at_most(one, other)


@each_dtype
def test_ratio_zero_is_the_pass_without_rows_bit_for_bit(dtype: torch.dtype) -> None:
    args, (_, source_row) = projections(2, 21, 3, 24, dtype), rows_of(21, 13 / 21)
    args[2][:, 4] = nan_with_payload(dtype, 1)
    v = args[2].clone()
    poison, nothing = torch.full((1, 13, 3, 24), NAN), torch.empty(1, 0, 3, 24)
    none = torch.full((21,), -1, dtype=torch.int32)
    plain = qk_norm_rope_kv_lerp_(*(x.clone() for x in args), nothing, nothing, none, torch.ones(2), eps=EPS)
    actual = qk_norm_rope_kv_lerp_(*args, poison, poison, source_row, torch.tensor([0.0, -0.0]), eps=EPS)
    for one, other in zip(actual, plain, strict=True):
        assert_bit_identical(one, other)
    assert_bit_identical(actual.v, v)


@each_dtype
def test_ratio_one_does_not_depend_on_the_locked_keys_and_values(dtype: torch.dtype) -> None:
    args, (index, source_row) = projections(2, 21, 3, 24, dtype), rows_of(21, 13 / 21)
    sources, where = [normal(2, 13, 3, 24, seed=seed, dtype=dtype) for seed in (6, 7)], index.long()
    sources[1][:, 0, 0, 0] = nan_with_payload(dtype, 1)
    clean = qk_norm_rope_kv_lerp_(*(x.clone() for x in args), *sources, source_row, torch.ones(2), eps=EPS)
    for x in args[1:3]:
        x[:, where] = NAN
    actual = qk_norm_rope_kv_lerp_(*args, *sources, source_row, torch.ones(2), eps=EPS)
    for one, other in zip(actual, clean, strict=True):
        assert_bit_identical(one, other)
    assert_bit_identical(actual.v[:, where], sources[1].flatten(2))
    cos, sin = args[5][where], args[6][where]
    assert_as_accurate_as_torch(
        actual.k[:, where],
        rotated(sources[0].flatten(2), cos, sin),
        rotated(sources[0].flatten(2).double(), cos.double(), sin.double()),
    )


def test_a_row_beyond_the_source_counts_as_none() -> None:
    args, (_, source_row) = projections(1, 21, 3, 24), rows_of(21, 13 / 21)
    nothing, none = torch.empty(1, 0, 3, 24), torch.full((21,), -1, dtype=torch.int32)
    plain = qk_norm_rope_kv_lerp_(*(x.clone() for x in args), nothing, nothing, none, torch.ones(1), eps=EPS)
    for one, other in zip(
        qk_norm_rope_kv_lerp_(*args, nothing, nothing, source_row, torch.ones(1), eps=EPS), plain, strict=True
    ):
        assert_bit_identical(one, other)


def test_an_angle_of_zero_and_a_weight_of_one_leave_the_norm_alone() -> None:
    q, k, v = (normal(1, 5, 8, seed=seed) for seed in range(3))
    one, zero = torch.ones(8), torch.zeros(5, 4)
    none, nothing = torch.full((5,), -1, dtype=torch.int32), torch.empty(1, 0, 8)
    expected = normed(q, one)
    actual = qk_norm_rope_kv_lerp_(q, k, v, one, one, zero.cos(), zero, nothing, nothing, none, torch.ones(1), eps=EPS)
    assert_within_roundings(actual.q, expected, 4)
    assert actual.q is q and actual.k is k and actual.v is v


def test_a_pair_turns_by_its_own_angle() -> None:
    q = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    angle = torch.tensor([[torch.pi / 2, torch.pi / 2, torch.pi, torch.pi]])
    nothing, none = torch.empty(1, 0, 4), int32(-1)
    options = {"eps": 0.0}
    weight = torch.full((4,), 0.5**0.5)  # the mean square of q is 1/2
    args = (q, q.clone(), q.clone(), weight, weight, angle.cos(), angle.sin(), nothing, nothing, none, torch.ones(1))
    turned = qk_norm_rope_kv_lerp_(*args, **options)
    assert_within_roundings(turned.q, torch.tensor([[[0.0, 1.0, 0.0, -1.0]]]), 2)


def test_each_sample_has_its_own_ratio_and_the_source_is_shared() -> None:
    args, (index, source_row) = projections(3, 7, 2, 4), rows_of(7, 4 / 7)
    source = normal(1, 4, 2, 4, seed=6)
    ratio, v = torch.tensor([0.0, 0.25, 1.0]), args[2].clone()
    actual = qk_norm_rope_kv_lerp_(*args, source, source, source_row, ratio, eps=EPS).v
    assert_bit_identical(actual, kv_lerp_(v, source, index, ratio))


def test_strided_projections_give_the_bits_of_contiguous_ones() -> None:
    fused = normal(2, 9, 3, 24)  # q, k, v side by side
    q, k, v = fused.unbind(2)
    _, _, _, *rest = projections(2, 9, 3, 8)
    _, source_row = rows_of(9, 5 / 9)
    sources = normal(5, 2, 3, 8, seed=6).transpose(0, 1), normal(2, 5, 48, seed=7)[..., ::2]
    ratio = torch.tensor([0.3, 0.6])
    expected = qk_norm_rope_kv_lerp_(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        *rest,
        sources[0].contiguous(),
        sources[1].contiguous(),
        source_row,
        ratio,
        eps=EPS,
    )
    for one, other in zip(
        qk_norm_rope_kv_lerp_(q, k, v, *rest, *sources, source_row, ratio, eps=EPS), expected, strict=True
    ):
        assert_bit_identical(one, other)


def test_one_strided_token_without_rows_keeps_its_values() -> None:
    v = normal(1, 1, 3, 8).unbind(2)[1]  # torch refuses to copy it to itself, as one written over while it is read
    before, (q, k, _, *rest) = v.clone(), projections(1, 1, 2, 4)
    nothing = torch.empty(1, 0, 2, 4)
    qk_norm_rope_kv_lerp_(q, k, v, *rest, nothing, nothing, int32(-1), torch.ones(1), eps=EPS)
    assert_bit_identical(v, before)


def test_empty_inputs_stay_empty() -> None:
    _, _, _, *rest = projections(1, 5, 2, 4)
    none, source = torch.full((5,), -1, dtype=torch.int32), torch.empty(1, 0, 2, 4)
    empty = [torch.empty(0, 5, 8) for _ in range(3)]
    assert qk_norm_rope_kv_lerp_(*empty, *rest, source, source, none, torch.ones(0), eps=EPS).q.shape == (0, 5, 8)


def _good() -> dict[str, Any]:
    names = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin")
    sources = {"k_source": normal(1, 3, 2, 4, seed=6), "v_source": normal(2, 3, 8, seed=7)}
    steering = {"source_row": int32(0, -1, 2, 1, -1), "ratio": torch.ones(2), "eps": EPS}
    return dict(zip(names, projections(2, 5, 2, 4), strict=True)) | sources | steering


@bad_inputs(
    Bad({"q": torch.zeros(2, 5, 2, 4)}, "q", "shape [2, 5, 2, 4]", "[B, N, C]"),
    Bad({"k": torch.zeros(2, 5, 9)}, "k", "shape [2, 5, 9]", "the shape of q = [2, 5, 8]"),
    Bad({"k": torch.zeros(1, 5, 8).expand(2, 5, 8)}, "k", "expanded", "can be written"),
    Bad({"v": torch.zeros(1, 5, 8).expand(2, 5, 8)}, "v", "expanded", "can be written"),
    Bad({"v": torch.zeros(2, 5, 8).half()}, "v", "dtype float16", "dtype float32"),
    Bad({"q_weight": torch.ones(4)}, "q_weight", "shape [4]", "[C] = [8]"),
    Bad({"k_weight": None}, "k_weight", "NoneType", "a tensor"),
    Bad({"cos": torch.ones(1, 5, 1, 4)}, "cos", "shape [1, 5, 1, 4]", "[N, D]"),
    Bad({"cos": torch.ones(5, 3)}, "cos", "shape [5, 3]", "D even and a divisor of C = 8"),
    Bad({"sin": torch.ones(4, 4)}, "sin", "shape [4, 4]", "[N, D] = [5, 4]"),
    Bad({"source_row": int32(0, 1, 2)}, "source_row", "shape [3]", "[N] = [5]"),
    Bad({"source_row": torch.zeros(5)}, "source_row", "dtype float32", "dtype int32"),
    Bad({"ratio": torch.ones(3)}, "ratio", "shape [3]", "[B] = [2]"),
    Bad({"k_source": torch.zeros(1, 3, 4, 2)}, "k_source", "shape [1, 3, 4, 2]", "[1, 3, 2, 4]"),
    Bad({"k_source": torch.zeros(1, 6, 2, 4)}, "k_source", "6 rows", "at most N = 5"),
    Bad({"v_source": torch.zeros(1, 2, 8)}, "v_source", "shape [1, 2, 8]", "[1, 3, 8]"),
    Bad({"k_source": torch.zeros(1, 3, 2, 4).to(INT8)}, "k_scale", "None", "because k_source is int8"),
    Bad({"eps": -1.0}, "eps", "-1.0", "at least 0"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    assert_refused(qk_norm_rope_kv_lerp_, _good(), bad)
