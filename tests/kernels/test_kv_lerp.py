"""kv_lerp_: source rows mixed into one tensor in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import Bad, assert_refused, bad_inputs
from regimes import STREAMING, all_of, each_regime, rows_of
from samples import DTYPES, NAN, extreme_rows, int32, nan_with_payload, normal, packed, source_rows
from tolerance import assert_as_accurate_as_torch, assert_bit_identical
from torch import Tensor

from kvlock_kernels import kv_lerp_, reference, unpack_kv

EACH_IMPLEMENTATION = True

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("inner", [(2, 4), (8,)], ids=["H2-D4", "C8"])


def formula(x: Tensor, source: Tensor, index: Tensor, ratio: Tensor) -> Tensor:
    """The definition in float64, one sample after the other; x and source are [B, N, ...] and [Bs, rows, ...]."""
    result = x.double()
    for b, a in enumerate(ratio.double().tolist()):
        s = source[b % source.shape[0]].double()
        result[b, index.long()] = (1 - a) * result[b, index.long()] + a * s
    return result


def by_torch(x: Tensor, rows: Tensor, index: Tensor, a: Tensor) -> list[Tensor]:
    """The same by torch.lerp in the dtype of x, and by the formula in fp32, rounded to it.

    torch.lerp rounds a product and a sum at once, so that a few numbers in fp32 may be all but exact. The formula has
    the roundings of the kernels, which fuse none on a GPU either; in 16 bits it is the more accurate of the two.
    """
    old = x[:, index.long()]
    by_lerp = torch.lerp(old, rows.to(x.dtype), a.to(x.dtype))
    by_formula = (1 - a) * old.float() + a * rows.float()
    return [x.index_copy(1, index.long(), mixed.to(x.dtype)) for mixed in (by_lerp, by_formula)]


@each_regime()
def test_the_lerp_has_the_bits_of_the_reference_and_is_as_accurate_as_torch_lerp_of_the_decoded_rows(
    regime: dict[str, Any],
) -> None:
    assert_right(regime)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("dim", STREAMING["dim"])
def test_every_combination_has_those_bits_and_is_as_accurate(dim: int, dtype: torch.dtype) -> None:
    for regime in all_of(dim, dtype):
        assert_right(regime)


def assert_right(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, sources), (source_dtype, mean) = regime["samples"], regime["source"]
    x = normal(b, n, 3, h, d, dtype=dtype)[:, :, 1]  # k of q, k, v side by side
    x = x.contiguous() if regime["contiguous"] else x
    (index, _), ratio = rows_of(n, regime["share"]), torch.tensor([regime["ratio"], 0.77])[:b]
    source, options, decoded = source_rows(source_dtype, sources, len(index), h, d, mean=mean)
    exact = formula(x, decoded, index, ratio)
    rows = reference.decode(source, options.get("source_scale"), options.get("source_mean"))
    native = by_torch(x, rows, index, ratio.reshape(b, 1, 1, 1))
    expected = x.clone()
    reference.kv_lerp_(expected, source, index, ratio, **options)
    actual = kv_lerp_(x, source, index, ratio, **options)
    if not x.is_cuda:  # there torch itself may round a product and a sum at once
        assert_bit_identical(actual, expected)
    assert_as_accurate_as_torch(actual, native, exact)


@each_dtype
@each_layout
def test_ratio_zero_leaves_the_row_bit_for_bit(dtype: torch.dtype, inner: tuple[int, ...]) -> None:
    x = normal(2, 6, *inner, dtype=dtype)
    x[:, 1, ..., 0] = nan_with_payload(dtype, 1)
    x[:, 2, ..., 1] = -0.0
    before = x.clone()
    source = torch.full((2, 3, *inner), NAN)
    kv_lerp_(x, source, int32(1, 2, 5), torch.tensor([0.0, -0.0]))
    assert_bit_identical(x, before)


@each_dtype
@each_layout
def test_ratio_one_gives_the_source_row_bit_for_bit(dtype: torch.dtype, inner: tuple[int, ...]) -> None:
    x = torch.full((2, 6, *inner), NAN, dtype=dtype)
    source = normal(2, 3, *inner, seed=1, dtype=dtype)
    source[:, 0, ..., 0] = nan_with_payload(dtype, 1)
    source[:, 1, ..., 1] = -0.0
    kv_lerp_(x, source, int32(5, 1, 2), torch.ones(2))
    assert_bit_identical(x[:, [5, 1, 2]], source)


@pytest.mark.parametrize("packing", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@each_dtype
def test_ratio_one_gives_packed_rows_as_unpack_decodes_them(dtype: torch.dtype, packing: torch.dtype) -> None:
    data, scale, mean = packed(packing, 2, 3, 2, 4, seed=1, mean=True)
    x = torch.full((2, 6, 2, 4), NAN, dtype=dtype)
    kv_lerp_(x, data, int32(5, 1, 2), torch.ones(2), source_scale=scale, source_mean=mean)
    assert_bit_identical(x[:, [5, 1, 2]], unpack_kv(data, scale, mean=mean, dtype=dtype))


def test_the_ratio_is_not_rounded_to_the_dtype_of_the_rows() -> None:
    x = torch.full((1, 1, 1, 1), 512.0, dtype=torch.bfloat16)
    kv_lerp_(x, torch.zeros(1, 1, 1, 1), int32(0), torch.tensor([0.999]))  # 1.0 in bf16
    assert_bit_identical(x, torch.full((1, 1, 1, 1), 0.512, dtype=torch.bfloat16))


@each_dtype
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=["bf16", "int8", "fp8"])
def test_extreme_rows_mix_to_the_bits_of_the_reference(dtype: torch.dtype, storage: torch.dtype) -> None:
    x, ratio = extreme_rows(dtype), torch.tensor([0.3])
    if x.is_cuda:
        pytest.skip("a GPU may round a product and a sum at once")
    index = torch.arange(x.shape[1], dtype=torch.int32)
    source, scale = reference.pack_kv(extreme_rows(torch.float32), index.flip(0), storage)
    expected, options = x.clone(), {"source_scale": scale if scale.numel() else None}
    reference.kv_lerp_(expected, source, index, ratio, **options)
    assert_bit_identical(kv_lerp_(x, source, index, ratio, **options), expected)


def test_ratios_outside_the_unit_interval_act_as_its_ends() -> None:
    x, source, index = normal(2, 6, 2, 4), normal(2, 3, 2, 4, seed=1), int32(0, 2, 4)
    actual = kv_lerp_(x.clone(), source, index, torch.tensor([-0.5, 1.5]))
    assert_bit_identical(actual, kv_lerp_(x.clone(), source, index, torch.tensor([0.0, 1.0])))


def test_a_nan_ratio_gives_nan_rows_in_its_own_sample_only() -> None:
    x, source = normal(2, 6, 2, 4), normal(1, 3, 2, 4, seed=1)
    actual = kv_lerp_(x.clone(), source, int32(0, 2, 4), torch.tensor([NAN, 0.0]))
    assert actual[0, [0, 2, 4]].isnan().all()
    assert_bit_identical(actual[0, [1, 3, 5]], x[0, [1, 3, 5]])
    assert_bit_identical(actual[1], x[1])


@each_dtype
@each_layout
def test_rows_outside_the_index_stay_bit_for_bit(dtype: torch.dtype, inner: tuple[int, ...]) -> None:
    x = normal(2, 6, *inner, dtype=dtype)
    x[:, 0, ..., 0] = nan_with_payload(dtype, 1)
    before = x.clone()
    kv_lerp_(x, normal(1, 3, *inner, seed=1), int32(4, 1, 2), torch.tensor([0.5, 1.0]))
    assert_bit_identical(x[:, [0, 3, 5]], before[:, [0, 3, 5]])
    assert (x[:, [4, 1, 2]] != before[:, [4, 1, 2]]).all()


def test_each_sample_has_its_own_ratio() -> None:
    ratio = torch.tensor([0.0, 0.25, 1.0])
    x = kv_lerp_(torch.zeros(3, 4, 1, 1), torch.ones(1, 2, 1, 1), int32(0, 3), ratio)
    expected = torch.tensor([[0.0, 0, 0, 0], [0.25, 0, 0, 0.25], [1, 0, 0, 1]]).reshape(3, 4, 1, 1)
    assert_bit_identical(x, expected)


def test_each_sample_has_its_own_source_unless_it_is_shared() -> None:
    x, source = torch.zeros(2, 3, 1, 1), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    assert kv_lerp_(x.clone(), source, int32(1), torch.ones(2)).flatten().tolist() == [0, 1, 0, 0, 2, 0]
    assert kv_lerp_(x.clone(), source[:1], int32(1), torch.ones(2)).flatten().tolist() == [0, 1, 0, 0, 1, 0]


def test_the_flat_layout_gives_the_bits_of_the_one_with_heads() -> None:
    x, ratio, index = normal(2, 6, 2, 4), torch.tensor([0.3, 0.6]), int32(0, 2, 4)
    data, scale, mean = packed(torch.int8, 2, 3, 2, 4, seed=1, mean=True)
    plain = normal(2, 3, 2, 4, seed=1)
    for source, options in ((plain, {}), (data, {"source_scale": scale, "source_mean": mean})):
        expected = kv_lerp_(x.clone(), source, index, ratio, **options).flatten(2)
        assert_bit_identical(kv_lerp_(x.flatten(2).clone(), source, index, ratio, **options), expected)
    expected = kv_lerp_(x.clone(), plain, index, ratio).flatten(2)
    assert_bit_identical(kv_lerp_(x.flatten(2).clone(), plain.flatten(2), index, ratio), expected)


@each_dtype
def test_strided_tensors_give_the_bits_of_contiguous_ones(dtype: torch.dtype) -> None:
    fused = normal(2, 6, 3, 2, 4, dtype=dtype)  # q, k, v side by side
    before = fused.clone()
    source = normal(2, 2, 3, 4, seed=1, dtype=dtype).transpose(1, 2)  # heads before rows in memory
    index, ratio = int32(0, 9, 2, 9, 4, 9)[::2], torch.tensor([0.3, 9.0, 0.6])[::2]
    k = fused[:, :, 1]
    assert not k.is_contiguous() and not source.is_contiguous() and not index.is_contiguous()
    expected = kv_lerp_(k.contiguous(), source.contiguous(), index.contiguous(), ratio.contiguous())
    kv_lerp_(k, source, index, ratio)
    assert_bit_identical(k, expected)
    assert_bit_identical(fused[:, :, ::2], before[:, :, ::2])

    heads_first = normal(2, 2, 6, 4, dtype=dtype)
    x = heads_first.transpose(1, 2)
    expected = kv_lerp_(x.contiguous(), source, index, ratio)
    assert_bit_identical(kv_lerp_(x, source, index, ratio), expected)


@pytest.mark.parametrize(
    "shape, strides",
    [
        ((1, 4, 2, 4), (0, 2, 4, 1)),
        ((2, 4, 2, 4), (24, 8, 4, 1)),
        ((2, 4, 2, 4), (32, 8, 3, 1)),
        ((2, 4, 2, 4), (32, 8, 4, 0)),
        ((1, 4, 8), (0, 4, 1)),
        ((2, 4, 8), (1, 8, 1)),
    ],
)
def test_a_tensor_that_overlaps_itself_is_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = torch.zeros(64).as_strided(shape, strides)
    with pytest.raises(ValueError, match="x: found an expanded or overlapping tensor"):
        kv_lerp_(x, torch.ones(1, 4, *shape[2:]), int32(0, 1, 2, 3), torch.ones(shape[0]))
    assert not x.any()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of [4, 6, 8, 10]
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "sliced": lambda x: x[::3, 1::2, ::2, 2:9:3],
    "split": lambda x: x.unflatten(3, (2, 5))[:, 2].transpose(1, 3),
    "diagonal": lambda x: x.diagonal(0, 1, 3).unflatten(2, (2, 3)),
    "unfolded": lambda x: x[:, 2].unfold(2, 3, 3),
    "one-of-an-axis": lambda x: x[:, :, :1].expand(4, 6, 1, 10).transpose(0, 3),
    "empty": lambda x: x[:, :0].expand(4, 0, 8, 10),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_every_view_whose_elements_have_places_of_their_own_changes(
    view: Callable[[Tensor], Tensor], compiles: bool
) -> None:
    torch.compiler.reset()
    lerp = torch.compile(kv_lerp_, fullgraph=True, dynamic=True, backend="aot_eager") if compiles else kv_lerp_
    x = view(normal(4, 6, 8, 10))
    index, source = int32(*range(x.shape[1])), normal(*x.shape, seed=1)
    assert_bit_identical(lerp(x, source, index, torch.ones(x.shape[0])), source)


@each_layout
def test_an_empty_input_changes_nothing(inner: tuple[int, ...]) -> None:
    x = normal(2, 6, *inner)
    assert_bit_identical(kv_lerp_(x.clone(), torch.empty(2, 0, *inner), int32(), torch.ones(2)), x)
    assert kv_lerp_(torch.empty(0, 6, *inner), normal(1, 3, *inner), int32(0, 1, 2), torch.ones(0)).shape[0] == 0
    assert kv_lerp_(torch.empty(2, 0, *inner), torch.empty(1, 0, *inner), int32(), torch.ones(2)).shape[1] == 0


def test_the_tensor_itself_is_returned() -> None:
    x = normal(2, 6, 2, 4)
    assert kv_lerp_(x, normal(1, 3, 2, 4), int32(0, 1, 2), torch.ones(2)) is x


def test_a_compiled_lerp_at_ratio_zero_keeps_the_bits() -> None:
    torch.compiler.reset()
    x = nan_with_payload(torch.bfloat16, 1, 4, 8)
    compiled = torch.compile(kv_lerp_, fullgraph=True, backend="aot_eager")
    assert_bit_identical(compiled(x.clone(), torch.ones(1, 1, 8), int32(2), torch.zeros(1)), x)


FP8 = torch.zeros(1, 3, 2, 4).to(torch.float8_e4m3fn)


@bad_inputs(
    Bad({"x": [1.0]}, "x", "list", "a tensor"),
    Bad({"x": torch.zeros(2, 6, 2, 4, dtype=torch.float64)}, "x", "dtype float64", "float32 or bfloat16 or float16"),
    Bad({"x": torch.zeros(2, 6)}, "x", "shape [2, 6]", "[B, N, H, D] or [B, N, C]"),
    Bad({"x": torch.zeros(1, 6, 2, 4).expand(2, 6, 2, 4)}, "x", "expanded", "can be written"),
    Bad({"source": torch.zeros(1, 3, 2, 4, dtype=torch.int32)}, "source", "dtype int32", "float8_e4m3fn or int8"),
    Bad({"source": torch.zeros(1, 4, 2, 4)}, "source", "shape [1, 4, 2, 4]", "[1, 3, 2, 4] or [2, 3, 2, 4]"),
    Bad({"source": torch.zeros(3, 3, 2, 4)}, "source", "shape [3, 3, 2, 4]", "[1, 3, 2, 4] or [2, 3, 2, 4]"),
    Bad({"source": torch.zeros(1, 3, 8)}, "source", "shape [1, 3, 8]", "[1, 3, 2, 4]"),
    Bad({"x": torch.zeros(2, 6, 9)}, "source", "shape [1, 3, 2, 4]", "[1, 3, 9]"),
    Bad({"source": torch.zeros(1, 3, 2, 4, device="meta")}, "source", "device meta", "device cpu"),
    Bad({"index": torch.arange(3)}, "index", "dtype int64", "dtype int32"),
    Bad({"index": int32(0, 1, 2)[None]}, "index", "shape [1, 3]", "[rows]"),
    Bad({"index": int32(*range(7))}, "index", "7 rows", "at most N = 6"),
    Bad({"ratio": 0.5}, "ratio", "float 0.5", "a tensor"),
    Bad({"ratio": torch.ones(3)}, "ratio", "shape [3]", "[B] = [2]"),
    Bad({"ratio": torch.ones(2).bfloat16()}, "ratio", "dtype bfloat16", "dtype float32"),
    Bad({"source": FP8}, "source_scale", "None", "[B, rows, H] fp32, because source is float8_e4m3fn"),
    Bad({"x": torch.zeros(2, 6, 8), "source": FP8.flatten(2)}, "source", "shape [1, 3, 8]", "[B, rows, H, D]"),
    Bad({"source": FP8, "source_scale": torch.ones(1, 3)}, "source_scale", "shape [1, 3]", "[1, 3, 2]"),
    Bad(
        {"source": FP8, "source_scale": torch.ones(1, 3, 2), "source_mean": torch.ones(2, 2, 4)},
        "source_mean",
        "shape [2, 2, 4]",
        "[1, 2, 4]",
    ),
    Bad({"source_scale": torch.ones(1, 3, 2)}, "source_scale", "a value", "None, because source is float32"),
    Bad({"source_mean": torch.ones(1, 2, 4)}, "source_mean", "a value", "None, because source is float32"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    good = {
        "x": torch.zeros(2, 6, 2, 4),
        "source": torch.zeros(1, 3, 2, 4),
        "index": int32(0, 2, 4),
        "ratio": torch.ones(2),
    }
    assert_refused(kv_lerp_, good, bad)
