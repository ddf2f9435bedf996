"""pack_kv and unpack_kv: source rows in a storage dtype, with a scale per token and head, and back."""

from typing import Any

import pytest
import torch
from refusals import Bad, assert_refused, bad_inputs
from regimes import STREAMING, all_of, each_regime, rows_of
from samples import DTYPES, NAN, extreme_rows, int32, normal
from tolerance import assert_bit_identical, assert_within_roundings

from kvlock_kernels import pack_kv, reference, unpack_kv

EACH_IMPLEMENTATION = True

INT8, FP8 = torch.int8, torch.float8_e4m3fn
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_packing = pytest.mark.parametrize(("packing", "limit"), [(INT8, 127.0), (FP8, 448.0)], ids=["int8", "fp8"])
ROWS = [6, 0, 3]


@each_regime()
def test_packing_and_unpacking_give_the_bits_of_the_reference(regime: dict[str, Any]) -> None:
    assert_same_bits(regime)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("dim", STREAMING["dim"])
def test_every_combination_gives_the_bits_of_the_reference(dim: int, dtype: torch.dtype) -> None:
    for regime in all_of(dim, dtype):
        assert_same_bits(regime)


def assert_same_bits(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, means), (storage, has_mean) = regime["samples"], regime["source"]
    x = normal(b, n, 3, h, d, dtype=dtype)[:, :, 1]
    x = x.contiguous() if regime["contiguous"] else x
    mean = normal(means, h, d, seed=1) if has_mean else None
    index, _ = rows_of(n, regime["share"])
    data, scale = pack_kv(x, index, storage, mean=mean)
    expected_data, expected_scale = reference.pack_kv(x, index, storage, mean=mean)
    assert_bit_identical(data, expected_data)
    assert_bit_identical(expected_scale if scale is None else scale, expected_scale)
    expected = reference.unpack_kv(data, scale, mean=mean, dtype=dtype)
    assert_bit_identical(unpack_kv(data, scale, mean=mean, dtype=dtype), expected)


@each_dtype
@each_packing
def test_the_scale_takes_the_largest_element_to_the_limit(
    dtype: torch.dtype, packing: torch.dtype, limit: float
) -> None:
    x = normal(2, 7, 3, 24, dtype=dtype)
    data, scale = pack_kv(x, int32(6, 0, 3), packing)
    assert data.dtype == packing and data.shape == (2, 3, 3, 24)
    assert scale is not None
    assert_bit_identical(scale, x[:, ROWS].float().abs().amax(-1) / torch.tensor(limit))
    assert (data.float().abs().amax(-1) == limit).all()


@each_dtype
def test_int8_rows_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    x = normal(2, 7, 3, 24, dtype=dtype)
    data, scale = pack_kv(x, int32(6, 0, 3), INT8)
    assert scale is not None
    error = (unpack_kv(data, scale) - x[:, ROWS].float()).abs()
    assert (error <= 0.5 * scale[..., None] * (1 + 1e-4)).all()


@each_dtype
def test_fp8_rows_come_back_within_half_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    x = normal(2, 7, 3, 24, dtype=dtype)
    data, scale = pack_kv(x, int32(6, 0, 3), FP8)
    assert scale is not None
    rows = x[:, ROWS].float()
    # Three bits of mantissa: half a unit is 1/16 of the value; below 2^-6 the step is the fixed 2^-9.
    allowed = torch.maximum(rows.abs() / 16, scale[..., None] * 2.0**-10)
    assert ((unpack_kv(data, scale) - rows).abs() <= allowed * (1 + 1e-4)).all()


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]).reshape(1, 1, 1, 8)
    data, scale = pack_kv(x, int32(0), INT8)
    assert scale is not None and scale.item() == 1.0
    assert data.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


def test_fp8_has_the_codes_of_a_torch_cast() -> None:
    x = torch.tensor([448.0, 447.0, 432.0, 17.0, 1.0625, -0.0, -3.3, 0.001]).reshape(1, 1, 1, 8)
    data, scale = pack_kv(x, int32(0), FP8)
    assert scale is not None and scale.item() == 1.0
    assert_bit_identical(data, x.to(FP8))


@each_packing
def test_the_largest_element_never_passes_the_limit(packing: torch.dtype, limit: float) -> None:
    """scale and its reciprocal are rounded, so that the largest element may come out above the limit."""
    x = (1 + torch.arange(2000) / 2000).reshape(1, 2000, 1, 1)
    data, scale = pack_kv(x, torch.arange(2000, dtype=torch.int32), packing)
    assert scale is not None
    assert (x * (1 / scale[..., None]) > limit).any()
    assert (data.float() == limit).all()


@each_packing
def test_a_row_without_a_normal_scale_has_scale_one_and_zeros(packing: torch.dtype, limit: float) -> None:
    """The reciprocal of a subnormal scale may be infinite."""
    x = normal(1, 7, 2, 4)
    x[0, 0, 1] = 0
    x[0, 3, 0] = 2.0**-149
    x[0, 6, 1] = limit * 2.0**-127
    data, scale = pack_kv(x, int32(6, 0, 3), packing)
    assert scale is not None
    assert (scale == 1).tolist() == [[[False, True], [False, True], [True, False]]]
    assert not unpack_kv(data, scale)[scale == 1].any()
    x[0, 6, 1] = limit * 2.0**-126
    data, scale = pack_kv(x, int32(6), packing)
    assert scale is not None and scale[0, 0, 1] == 2.0**-126
    assert (data[0, 0, 1].float() == limit).all()


def test_each_token_and_head_has_its_own_scale() -> None:
    x = torch.ones(1, 2, 2, 3) * torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).reshape(1, 2, 2, 1)
    data, scale = pack_kv(x, int32(1, 0), INT8)
    assert (data == 127).all()
    assert scale is not None
    for one, by_hand in zip(scale.flatten() * 127, torch.tensor([100.0, 1000.0, 1.0, 10.0]), strict=True):
        assert_within_roundings(one, by_hand, 2)


@each_packing
@pytest.mark.parametrize("samples", [1, 2], ids=["shared-mean", "mean-per-sample"])
def test_the_mean_is_subtracted_in_fp32_and_added_back(packing: torch.dtype, limit: float, samples: int) -> None:
    x = normal(2, 7, 2, 16, dtype=torch.bfloat16)
    x[..., 3] += 40  # outlier channels, as keys have them
    x[..., 5] -= 30
    mean = x.float().mean(1)[:samples]
    data, scale = pack_kv(x, int32(6, 0, 3), packing, mean=mean)
    expected, expected_scale = pack_kv(x.float() - mean[:, None], int32(6, 0, 3), packing)
    assert_bit_identical(data, expected)
    assert scale is not None and expected_scale is not None
    assert_bit_identical(scale, expected_scale)

    rows = x[:, ROWS].float()
    centred = (unpack_kv(data, scale, mean=mean) - rows).abs().mean()
    raw = (unpack_kv(*pack_kv(x, int32(6, 0, 3), packing)) - rows).abs().mean()
    assert centred < 0.5 * raw


@each_dtype
@pytest.mark.parametrize("storage", DTYPES, ids=str)
def test_a_floating_dtype_is_a_plain_cast_in_new_memory(dtype: torch.dtype, storage: torch.dtype) -> None:
    x = normal(2, 7, 2, 4, dtype=dtype)
    data, scale = pack_kv(x, int32(6, 0, 3), storage)
    assert scale is None
    assert_bit_identical(data, x[:, ROWS].to(storage))
    back = unpack_kv(data, dtype=dtype)
    assert_bit_identical(back, data.to(dtype))
    assert back.data_ptr() != data.data_ptr()


@each_dtype
@each_packing
def test_unpacking_rounds_once(dtype: torch.dtype, packing: torch.dtype, limit: float) -> None:
    x, mean = normal(2, 7, 2, 4), normal(2, 2, 4, seed=1)
    data, scale = pack_kv(x, int32(6, 0, 3), packing, mean=mean)
    assert scale is not None
    expected = (data.float() * scale[..., None] + mean[:, None]).to(dtype)
    assert_bit_identical(unpack_kv(data, scale, mean=mean, dtype=dtype), expected)


def test_codes_of_nan_are_decoded_as_nan() -> None:
    codes = torch.tensor([0x7F, 0xFF, 0x7E, 0xFE], dtype=torch.uint8).reshape(1, 1, 1, 4)
    rows = unpack_kv(codes.view(FP8), torch.ones(1, 1, 1)).flatten()
    assert rows.isnan().tolist() == [True, True, False, False] and rows[2:].tolist() == [448, -448]


@each_packing
@pytest.mark.parametrize("value", [NAN, float("inf")], ids=str)
def test_a_row_that_is_not_finite_keeps_no_finite_value(packing: torch.dtype, limit: float, value: float) -> None:
    x = normal(1, 7, 2, 4)
    x[0, 0, 1, 2] = value
    rows = unpack_kv(*pack_kv(x, int32(6, 0, 3), packing))
    assert not rows[0, 1, 1].isfinite().any()
    assert rows[0, [0, 2]].isfinite().all() and rows[0, 1, 0].isfinite().all()


@each_dtype
@pytest.mark.parametrize(
    ("storage", "has_mean"),
    [(INT8, False), (INT8, True), (FP8, False), (FP8, True), (torch.bfloat16, False)],
    ids=["int8", "int8-mean", "fp8", "fp8-mean", "bf16"],
)
def test_extreme_rows_have_the_bits_of_the_reference(
    dtype: torch.dtype, storage: torch.dtype, has_mean: bool
) -> None:
    x = extreme_rows(dtype)
    index = torch.arange(x.shape[1], dtype=torch.int32).flip(0)
    mean = x[:, 3].float() if has_mean else None
    data, scale = pack_kv(x, index, storage, mean=mean)
    expected, expected_scale = reference.pack_kv(x, index, storage, mean=mean)
    assert_bit_identical(data, expected)
    assert_bit_identical(expected_scale if scale is None else scale, expected_scale)
    for back in DTYPES:
        wanted = reference.unpack_kv(data, scale, mean=mean, dtype=back)
        assert_bit_identical(unpack_kv(data, scale, mean=mean, dtype=back), wanted)


@each_packing
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")], ids=str)
def test_rows_that_are_not_finite_have_the_codes_of_the_reference(
    packing: torch.dtype, limit: float, value: float
) -> None:
    x = normal(1, 7, 2, 24)
    x[0, 0, 1, 2] = value
    for actual, expected in zip(
        pack_kv(x, int32(6, 0, 3), packing), reference.pack_kv(x, int32(6, 0, 3), packing), strict=True
    ):
        assert actual is not None
        nan = expected.float().isnan()
        assert torch.equal(actual.float().isnan(), nan)
        assert_bit_identical(actual.float().masked_fill(nan, 0), expected.float().masked_fill(nan, 0))


@each_packing
def test_strided_tensors_give_the_bits_of_contiguous_ones(packing: torch.dtype, limit: float) -> None:
    x = normal(2, 2, 7, 4).transpose(1, 2)
    index = int32(6, 9, 0, 9, 3, 9)[::2]
    data, scale = pack_kv(x, index, packing)
    expected, expected_scale = pack_kv(x.contiguous(), int32(6, 0, 3), packing)
    assert scale is not None and expected_scale is not None
    assert_bit_identical(data, expected)
    assert_bit_identical(scale, expected_scale)
    assert_bit_identical(unpack_kv(data[:, ::2], scale[:, ::2]), unpack_kv(data, scale)[:, ::2].contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, INT8, FP8], ids=str)
@pytest.mark.parametrize(("b", "rows"), [(0, (6, 0, 3)), (2, ())], ids=["B0", "rows0"])
def test_an_empty_input_gives_an_empty_output(dtype: torch.dtype, b: int, rows: tuple[int, ...]) -> None:
    index = int32(*rows)
    packed = pack_kv(normal(b, 7, 2, 4), index, dtype)
    assert packed.data.shape == (b, len(index), 2, 4) and packed.data.dtype == dtype
    assert (None if packed.scale is None else packed.scale.shape) in (None, (b, len(index), 2))
    assert unpack_kv(*packed).shape == (b, len(index), 2, 4)


@bad_inputs(
    Bad({"x": torch.zeros(2, 7, 8)}, "x", "shape [2, 7, 8]", "[B, N, H, D]"),
    Bad({"x": torch.zeros(2, 7, 2, 0)}, "x", "shape [2, 7, 2, 0]", "D >= 1"),
    Bad({"x": torch.zeros(2, 7, 2, 4, dtype=INT8)}, "x", "dtype int8", "dtype float32"),
    Bad({"index": torch.arange(3)}, "index", "dtype int64", "dtype int32"),
    Bad({"index": int32(0, 1)[None]}, "index", "shape [1, 2]", "[rows]"),
    Bad({"dtype": torch.float8_e5m2}, "dtype", "torch.float8_e5m2", "float8_e4m3fn or int8"),
    Bad({"dtype": "int8"}, "dtype", "'int8'", "float8_e4m3fn or int8"),
    Bad({"mean": torch.zeros(2, 4)}, "mean", "shape [2, 4]", "[1, 2, 4] or [2, 2, 4]"),
    Bad({"mean": torch.zeros(1, 2, 4).half()}, "mean", "dtype float16", "dtype float32"),
    Bad({"dtype": torch.bfloat16, "mean": torch.zeros(1, 2, 4)}, "mean", "a value", "None, because dtype is"),
)
def test_bad_inputs_to_packing_are_named(bad: Bad) -> None:
    assert_refused(pack_kv, {"x": torch.zeros(2, 7, 2, 4), "index": int32(6, 0, 3), "dtype": INT8}, bad)


@bad_inputs(
    Bad({"data": torch.zeros(2, 3, 2, 4).double()}, "data", "dtype float64", "float8_e4m3fn or int8"),
    Bad({"data": torch.zeros(2, 3, 8, dtype=INT8)}, "data", "shape [2, 3, 8]", "[B, rows, H, D]"),
    Bad({"scale": None}, "scale", "None", "[B, rows, H] fp32, because data is int8"),
    Bad({"scale": torch.ones(2, 3, 1)}, "scale", "shape [2, 3, 1]", "[B, rows, H] = [2, 3, 2]"),
    Bad({"data": torch.zeros(2, 3, 2, 4)}, "scale", "a value", "None, because data is float32"),
    Bad({"mean": torch.zeros(3, 2, 4)}, "mean", "shape [3, 2, 4]", "[1, 2, 4] or [2, 2, 4]"),
    Bad({"dtype": INT8}, "dtype", "torch.int8", "float32, bfloat16 or float16"),
)
def test_bad_inputs_to_unpacking_are_named(bad: Bad) -> None:
    assert_refused(unpack_kv, {"data": torch.zeros(2, 3, 2, 4, dtype=INT8), "scale": torch.ones(2, 3, 2)}, bad)
