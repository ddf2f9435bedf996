"""The compiled extension on the CPU: the bits of the reference."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from regimes import each_regime, rows_of
from samples import DTYPES, int32, normal, packed, scattered, source_rows
from serving import ON_CUDA, served, triton_on_cuda
from tolerance import assert_bit_identical
from torch import Tensor

from kvlock_kernels import _cuda, _extension, info, kv_lerp_, pack_kv, reference, unpack_kv

pytestmark = pytest.mark.skipif(_extension.path() is None, reason=f"the extension is not built: {_extension.BUILD}")

INT8, FP8 = torch.int8, torch.float8_e4m3fn
STORAGE = (*DTYPES, INT8, FP8)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Wants the same bits, but any NaN for a NaN: of two in one product, hardware keeps the sign of one."""
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    zero = lambda x: x.float().masked_fill(nan, 0)
    assert actual.dtype == expected.dtype
    assert_bit_identical(zero(actual), zero(expected))


def assert_packs_as_the_reference(
    x: Tensor, index: Tensor, dtype: torch.dtype, mean: Tensor | None, *, payloads: bool = False
) -> None:
    """Wants the same bytes of codes and scales; for a NaN in a code any, in a scale where those of x have payloads."""
    data, scale = torch.ops.kvlock_kernels.pack_kv(x, index, dtype, mean=mean)
    expected, expected_scale = reference.pack_kv(x, index, dtype, mean=mean)
    (assert_bit_identical if dtype == torch.int8 else assert_same)(data, expected)
    (assert_same if payloads else assert_bit_identical)(scale, expected_scale)
    data, scale = expected, expected_scale if dtype in reference.EIGHT_BIT else None
    for back in DTYPES:
        unpacked = unpack_kv(data, scale, mean=mean, dtype=back)
        assert_same(unpacked, reference.unpack_kv(data, scale, mean=mean, dtype=back))


def test_it_serves_its_operators_and_leaves_the_fallbacks_to_python() -> None:
    for name in _extension.OPERATORS:
        assert _extension.serves(f"kvlock_kernels::{name}", "CPU") and info.on_cpu(name) == "extension"
        on_cuda = name in _extension.ON_CUDA and bool(_extension.architectures())
        assert _extension.serves(f"kvlock_kernels::fallback_{name}", "CUDA") == on_cuda
    assert info.on_cpu("lock_schedule").startswith("reference")


def test_it_serves_again_after_another_implementation_did() -> None:
    called = []
    x, index = normal(1, 3, 1, 8), int32(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with served({"pack_kv": lambda *args, **kwargs: called.append(1) or reference.pack_kv(*args, **kwargs)}):
            pack_kv(x, index, INT8)
    pack_kv(x, index, INT8)
    assert called == [1]


@pytest.mark.skipif(not ON_CUDA, reason="the extension has no CUDA part")
def test_the_triton_kernels_can_be_put_before_it_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def launcher(name: str) -> Any:
        return lambda *args, **kwargs: called.append(name) or getattr(reference, name)(*args, **kwargs)

    monkeypatch.setattr(_cuda, "launchers", lambda: {name: launcher(name) for name in _cuda.OPERATORS})
    x, index, on_cuda = normal(1, 3, 1, 8), int32(0), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with triton_on_cuda():  # tensors on the CPU, as if they were on a GPU
        data, scale = torch.ops.kvlock_kernels.pack_kv.default.redispatch(on_cuda, x, index, INT8)
        torch.ops.kvlock_kernels.unpack_kv.default.redispatch(on_cuda, data, scale, dtype=torch.float32)
        torch.ops.kvlock_kernels.kv_lerp_.default.redispatch(on_cuda, x, x[:, :1], index, torch.ones(1))
    assert called == ["pack_kv", "unpack_kv", "kv_lerp_"] and set(ON_CUDA) == set(called)


@each_regime()
def test_a_lerp_has_the_bits_of_the_reference(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, sources), (source_dtype, mean) = regime["samples"], regime["source"]
    x = normal(b, n, 3, h, d, dtype=dtype)[:, :, 1]
    x = x.contiguous() if regime["contiguous"] else x
    (index, _), ratio = rows_of(n, regime["share"]), torch.tensor([regime["ratio"], 0.77])[:b]
    source, options, _ = source_rows(source_dtype, sources, len(index), h, d, mean=mean)
    expected = x.clone()
    reference.kv_lerp_(expected, source, index, ratio, **options)
    assert_bit_identical(kv_lerp_(x, source, index, ratio, **options), expected)


dims = st.sampled_from((1, 3, 8, 24, 40, 128, 260))
sizes = st.tuples(st.sampled_from((1, 2, 1, 2, 0)), st.integers(1, 9), st.integers(1, 3), dims)
exponents = st.integers(-44, 38) | st.sampled_from((-37, -36))  # of ten; there scales cease to be normal numbers
special = st.lists(st.sampled_from((0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, 2.0**-126)), max_size=4)
layouts = st.sampled_from(("dense", "heads first", "one of three", "every other element"))
ratios = st.lists(st.floats(-0.5, 1.5) | st.sampled_from((0.0, 1.0, 0.999, math.nan)), min_size=2, max_size=2)


def numbers(
    shape: tuple[int, ...], exponent: int, values: list[float], seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal numbers times ten to the exponent, a first token of zeros beside others, and some special values."""
    x = normal(*shape, seed=seed).double().mul(10.0**exponent).to(dtype)
    x[:, :1] *= float(shape[1] == 1)
    for i, value in enumerate(values):
        x.view(-1)[5 * i :: 97] = value
    return x


def laid_out(layout: str, x: Tensor) -> Tensor:
    """x [B, N, ..] with the strides that the layout has."""
    codes = x.view(torch.uint8) if x.dtype in reference.EIGHT_BIT else x
    if layout == "heads first":
        codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "one of three":
        codes = torch.stack([codes] * 3, 2)[:, :, 1]
    elif layout == "every other element":
        codes = torch.stack([codes] * 2, -1).flatten(-2)[..., ::2]
    return codes.view(x.dtype)


@settings(max_examples=150, deadline=None)
@example(  # too large for fp16: a code is the product of two NaN
    size=(1, 2, 1, 8), share=1.0, exponent=5, values=[], layout="dense", seed=0, dtype=torch.float16,
    storage=torch.float8_e4m3fn, means=None,
)  # fmt: skip
@given(
    size=sizes, share=st.floats(0, 1), exponent=exponents, values=special, layout=layouts, seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES), storage=st.sampled_from(STORAGE), means=st.sampled_from((None, "one", "each")),
)  # fmt: skip
def test_packing_has_the_bits_of_the_reference(
    size: tuple[int, int, int, int], share: float, exponent: int, values: list[float], layout: str, seed: int,
    dtype: torch.dtype, storage: torch.dtype, means: str | None,
) -> None:  # fmt: skip
    b, n, h, d = size
    x = laid_out(layout, numbers(size, exponent, values, seed, dtype))
    mean = None
    if means is not None and storage in reference.EIGHT_BIT:
        mean = laid_out(layout, numbers((b if means == "each" else 1, h, d), exponent, [], seed + 1))
    assert_packs_as_the_reference(x, scattered(n, round(share * n)), storage, mean)


@settings(max_examples=200, deadline=None)
@given(
    size=sizes, share=st.floats(0, 1), exponent=exponents, values=special, layout=layouts, seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES), storage=st.sampled_from(STORAGE), shared=st.booleans(), flat=st.booleans(),
    means=st.sampled_from((None, "one", "each")), ratio=ratios,
)  # fmt: skip
def test_decoding_and_lerping_any_codes_have_the_bits_of_the_reference(
    size: tuple[int, int, int, int], share: float, exponent: int, values: list[float], layout: str, seed: int,
    dtype: torch.dtype, storage: torch.dtype, shared: bool, flat: bool, means: str | None, ratio: list[float],
) -> None:  # fmt: skip
    b, n, h, d = size
    index, sources = scattered(n, round(share * n)), 1 if shared else b
    shape, scale, mean = (sources, len(index), h, d), None, None
    if storage in reference.EIGHT_BIT:  # all codes, also those that packing gives to nothing
        codes = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        source = laid_out(layout, codes.view(storage))
        scale = laid_out(layout, numbers(shape[:3], exponent, values, seed + 1).abs())
        if means is not None:
            mean = laid_out(layout, numbers((sources if means == "each" else 1, h, d), exponent, values, seed + 2))
    else:
        source = laid_out(layout, numbers(shape, exponent, values, seed, storage))
    unpacked = unpack_kv(source, scale, mean=mean, dtype=dtype)
    assert_same(unpacked, reference.unpack_kv(source, scale, mean=mean, dtype=dtype))

    x = laid_out(layout, numbers(size, exponent, values, seed + 3, dtype))
    x = x.flatten(2) if flat else x
    expected, options = x.clone(), {"source_scale": scale, "source_mean": mean}
    reference.kv_lerp_(expected, source, index, torch.tensor(ratio[:b]), **options)
    assert_same(kv_lerp_(x, source, index, torch.tensor(ratio[:b]), **options), expected)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_every_number_of_16_bits_packs_as_the_reference_packs_it(dtype: torch.dtype) -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(1, 2**9, 1, 2**7)
    for floating in (torch.bfloat16, torch.float16):
        x, index = codes.view(floating), torch.arange(2**9, dtype=torch.int32)
        assert_packs_as_the_reference(x, index, dtype, None, payloads=True)


@pytest.mark.parametrize(("dtype", "limit"), [(INT8, 127.0), (FP8, 448.0)], ids=["int8", "fp8"])
def test_every_size_of_a_code_is_rounded_as_the_reference_rounds_it(dtype: torch.dtype, limit: float) -> None:
    """Beside an element at the limit the scale is 1: the others reach every code, and every tie between two."""
    values = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).float()
    values = values[values <= limit]
    values = torch.cat([values * (1 + 2.0**-20), values, -values * (1 - 2.0**-20)]).clamp(max=limit)
    rows = len(values) // 127
    values = torch.cat([torch.full((rows, 1), limit), values[: 127 * rows].reshape(rows, 127)], 1)
    x = values[None, :, None]
    assert_packs_as_the_reference(x, torch.arange(x.shape[1], dtype=torch.int32), dtype, None)


@pytest.mark.parametrize("row", [7, -1])
def test_a_row_out_of_range_is_named_before_anything_is_touched(row: int) -> None:
    message = f"index: found {row} for row 1, wanted at least 0 and below N = 7"
    with pytest.raises(RuntimeError, match=message):
        pack_kv(normal(1, 7, 2, 4), int32(0, row), INT8)
    with pytest.raises(RuntimeError, match=message):
        kv_lerp_(normal(1, 7, 2, 4), normal(1, 2, 2, 4), int32(0, row), torch.ones(1))


def test_bad_arguments_below_the_door_are_named() -> None:
    ops, x, index = torch.ops.kvlock_kernels, normal(2, 7, 2, 4), int32(0, 1)
    data, scale, _ = packed(INT8, 2, 2, 2, 4, seed=1)
    for name, wanted, call in (
        ("x", "wanted .B, N, H, D.", lambda: ops.pack_kv(x.flatten(2), index, INT8)),
        ("x", "wanted float32", lambda: ops.pack_kv(x.double(), index, INT8)),
        ("index", "wanted int32", lambda: ops.pack_kv(x, index.long(), INT8)),
        ("dtype", "wanted float32", lambda: ops.pack_kv(x, index, torch.float64)),
        ("mean", "wanted 1 or 2", lambda: ops.pack_kv(x, index, INT8, mean=torch.zeros(3, 2, 4))),
        ("mean", "wanted None", lambda: ops.pack_kv(x, index, torch.float16, mean=torch.zeros(1, 2, 4))),
        ("scale", "wanted a value", lambda: ops.unpack_kv(data, None, dtype=torch.float32)),
        ("scale", r"shape .1, 2, 2., wanted .2, 2, 2.", lambda: ops.unpack_kv(data, scale[:1], dtype=torch.float32)),
        ("dtype", "wanted a floating one", lambda: ops.unpack_kv(data, scale, dtype=INT8)),
        ("source", "wanted 2", lambda: ops.kv_lerp_(x, x[:, :3], index, torch.ones(2))),
        ("ratio", "wanted float32", lambda: ops.kv_lerp_(x, x[:, :2], index, torch.ones(2).half())),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: found .*{wanted}"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("d", [8, 5], ids=["wide", "any"])
def test_more_samples_than_a_grid_has_rows_are_served(d: int) -> None:
    """65535 is where every axis of a grid ends but the first."""
    with torch.device("cuda"):
        x, index = normal(70000, 2, 1, d), int32(1)
        for dtype in (INT8, torch.bfloat16):
            assert_packs_as_the_reference(x, index, dtype, None)
        expected, source, ratio = x.clone(), normal(70000, 1, 1, d, seed=1), torch.full((70000,), 0.3)
        reference.kv_lerp_(expected, source, index, ratio)
        assert_same(kv_lerp_(x, source, index, ratio), expected)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_several_threads_give_the_bits_of_one(dtype: torch.dtype) -> None:
    """Enough tokens for each of four threads, and not the same number for all."""
    x, index = normal(2, 4001, 12, 16), scattered(4001, 3001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert_packs_as_the_reference(x, index, dtype, None)
    finally:
        torch.set_num_threads(before)
