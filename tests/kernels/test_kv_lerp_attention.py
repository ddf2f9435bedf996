"""kv_lerp_attention: attention to mixed keys and values that leaves both as they are."""

from typing import Any

import pytest
import torch
from evaluations import attentions, draws, log_sum_exps
from refusals import Bad, assert_refused, bad_inputs
from samples import DTYPES, NAN, int32, normal, packed, scattered
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings
from torch import Tensor

from kvlock_kernels import kv_lerp_attention, kv_lerp_attention_, kv_lerp_pair_

EACH_IMPLEMENTATION = True

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# B, Bs, M, N, rows, H, D
SHAPES = {
    "B1-M45-N45-H2-D32-tail": (1, 1, 45, 45, 19, 2, 32),
    "B2-M7-N130-H3-D24-fewer-queries": (2, 1, 7, 130, 130, 3, 24),
    "B2-M70-N3-H1-D128-fewer-keys": (2, 2, 70, 3, 1, 1, 128),
    "B1-M1-N2-H8-D8-two-keys": (1, 1, 1, 2, 1, 8, 8),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def inputs(shape: Any, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    b, bs, m, n, rows, h, d = shape
    return {
        "q": normal(b, m, h, d, seed=seed, dtype=dtype),
        "k": normal(b, n, h, d, seed=seed + 1, dtype=dtype),
        "v": normal(b, n, h, d, seed=seed + 2, dtype=dtype),
        "k_source": normal(bs, rows, h, d, seed=seed + 3, dtype=dtype),
        "v_source": normal(bs, rows, h, d, seed=seed + 4, dtype=dtype),
        "index": scattered(n, rows),
        "ratio": torch.tensor([0.3, 0.8])[:b],
    }


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in the dtype of its arguments: out [B, M, H, D] and lse [B, H, M]."""
    scores = scale * torch.einsum("bmhd,bnhd->bhmn", q, k)
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v), scores.logsumexp(-1)


def lerped(args: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    copy = args | {"k": args["k"].clone(), "v": args["v"].clone()}
    del copy["q"]
    return kv_lerp_pair_(**copy, **options)


@each_shape
@each_dtype
def test_it_is_as_accurate_as_torch_on_lerped_copies(shape: Any, dtype: torch.dtype) -> None:
    args = inputs(shape, dtype)
    k, v = lerped(args)
    scale = shape[-1] ** -0.5
    out = kv_lerp_attention(**args).out
    exact, _ = plain_attention(args["q"].double(), k.double(), v.double(), scale)
    assert_as_accurate_as_torch(out, attentions(args["q"], k, v, scale), exact)


@each_shape
@each_dtype
def test_the_log_sum_exp_is_as_accurate_as_torch_in_fp32(shape: Any, dtype: torch.dtype) -> None:
    b, _, m, *_, h, d = shape
    actual, native, exact = [], [], []
    for draw in draws(b * m * h):
        args = inputs(shape, dtype, seed=10 * draw)
        k, v = lerped(args)
        lse = kv_lerp_attention(**args, return_lse=True).lse
        assert lse is not None and lse.dtype == torch.float32
        actual.append(lse)
        native.append(torch.stack(log_sum_exps(args["q"], k, d**-0.5)))
        exact.append(plain_attention(args["q"].double(), k.double(), v.double(), d**-0.5)[1])
    assert_as_accurate_as_torch(torch.cat(actual), torch.cat(native, 1).unbind(), torch.cat(exact))


@each_dtype
def test_the_lerped_row_is_rounded_before_it_is_attended_to(dtype: torch.dtype) -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], dtype)
    k, v = lerped(args)
    none = torch.empty(1, 0, 2, 32)
    expected = kv_lerp_attention(args["q"], k, v, none, none, int32(), args["ratio"], return_lse=True)
    actual = kv_lerp_attention(**args, return_lse=True)
    assert_bit_identical(actual.out, expected.out)
    assert_bit_identical(actual.lse, expected.lse)


@each_dtype
def test_packed_source_rows_are_decoded_as_the_lerp_does(dtype: torch.dtype) -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], dtype)
    args["k_source"], k_scale, k_mean = packed(torch.int8, 1, 19, 2, 32, seed=3, mean=True)
    args["v_source"], v_scale, v_mean = packed(torch.float8_e4m3fn, 1, 19, 2, 32, seed=4, mean=True)
    options = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean, "v_mean": v_mean}
    k, v = lerped(args, **options)
    none = torch.empty(1, 0, 2, 32)
    expected = kv_lerp_attention(args["q"], k, v, none, none, int32(), args["ratio"])
    assert_bit_identical(kv_lerp_attention(**args, **options).out, expected.out)


def test_ratio_zero_never_sees_the_source() -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], torch.float32)
    args["ratio"] = torch.zeros(1)
    expected = kv_lerp_attention(**args).out
    args["k_source"], args["v_source"] = (torch.full_like(args["k_source"], NAN) for _ in range(2))
    assert_bit_identical(kv_lerp_attention(**args).out, expected)


def test_ratio_one_attends_to_the_source_only() -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], torch.float32)
    args["ratio"] = torch.ones(1)
    expected = kv_lerp_attention(**args).out
    args["k"][:, args["index"].long()] = NAN
    args["v"][:, args["index"].long()] = NAN
    assert_bit_identical(kv_lerp_attention(**args).out, expected)


@each_shape
@each_dtype
def test_in_place_it_is_attention_to_lerped_copies_and_uses_up_nothing_else(shape: Any, dtype: torch.dtype) -> None:
    args = inputs(shape, dtype)
    before, (k, v) = {name: tensor.clone() for name, tensor in args.items()}, lerped(args)
    native = attentions(args["q"], k, v, shape[-1] ** -0.5)
    exact, _ = plain_attention(args["q"].double(), k.double(), v.double(), shape[-1] ** -0.5)
    assert_as_accurate_as_torch(kv_lerp_attention_(**args), native, exact)
    for name, mixed in (("k", k), ("v", v)):
        assert ((args[name] == before[name]) | (args[name] == mixed)).all()
    assert all(torch.equal(args[name], before[name]) for name in args if name not in ("k", "v"))


def test_one_key_gives_its_value() -> None:
    one = torch.ones(1, 1, 1, 2)
    out, lse = kv_lerp_attention(
        one, one, one, 3 * one, 5 * one, int32(0), torch.tensor([0.5]), scale=2.0, return_lse=True
    )
    assert out.flatten().tolist() == [3.0, 3.0]  # half way from 1 to 5
    assert lse is not None and lse.flatten().tolist() == [8.0]  # 2 * (2 + 2), natural logarithm


@each_dtype
def test_one_key_gives_its_value_whatever_its_score(dtype: torch.dtype) -> None:
    args = inputs((1, 1, 4, 1, 1, 8, 8), dtype)
    _, v = lerped(args)
    for out in (kv_lerp_attention(**args).out, kv_lerp_attention(**args, return_lse=True).out):  # of another kernel
        assert_within_roundings(out, v.expand(1, 4, 8, 8), 2)  # a weight near 1, and the division by it


def test_the_log_sum_exp_comes_on_request_only() -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], torch.float32)
    out, lse = kv_lerp_attention(**args)
    assert lse is None
    qkv = args["q"], *lerped(args)
    native, (exact, _) = list(attentions(*qkv, 32**-0.5)), plain_attention(*(x.double() for x in qkv), 32**-0.5)
    for one in (out, kv_lerp_attention(**args, return_lse=True).out):  # perhaps from another kernel
        assert_as_accurate_as_torch(one, native, exact)


def test_the_default_scale_is_one_over_the_root_of_the_head_dimension() -> None:
    args = inputs(SHAPES["B2-M7-N130-H3-D24-fewer-queries"], torch.float32)
    assert_bit_identical(kv_lerp_attention(**args).out, kv_lerp_attention(**args, scale=24**-0.5).out)
    assert not torch.equal(kv_lerp_attention(**args).out, kv_lerp_attention(**args, scale=1).out)


def test_large_scores_do_not_overflow() -> None:
    args = inputs(SHAPES["B1-M45-N45-H2-D32-tail"], torch.float32)
    out, lse = kv_lerp_attention(**args, scale=1e4, return_lse=True)
    assert lse is not None and out.isfinite().all() and lse.isfinite().all()


@each_dtype
def test_strided_tensors_give_the_bits_of_contiguous_ones(dtype: torch.dtype) -> None:
    fused, sources = normal(2, 6, 3, 2, 4, dtype=dtype), normal(2, 2, 3, 2, 4, seed=1, dtype=dtype)
    q, k, v = fused.unbind(2)
    k_source, v_source = sources.transpose(2, 3).unbind(1)[0].transpose(1, 2), sources[:, 1]
    index, ratio = int32(5, 0, 2), torch.tensor([0.3, 0.6])
    assert not k.is_contiguous() and not k_source.is_contiguous()
    strided = kv_lerp_attention(q, k, v, k_source, v_source, index, ratio, return_lse=True)
    dense = (tensor.contiguous() for tensor in (q, k, v, k_source, v_source))
    contiguous = kv_lerp_attention(*dense, index, ratio, return_lse=True)
    assert_bit_identical(strided.out, contiguous.out)
    assert_bit_identical(strided.lse, contiguous.lse)


@pytest.mark.parametrize(("b", "m"), [(0, 5), (2, 0)], ids=["B0", "M0"])
def test_no_samples_or_no_queries_give_an_empty_output(b: int, m: int) -> None:
    args = inputs((b, 1, m, 6, 3, 2, 4), torch.bfloat16)
    out, lse = kv_lerp_attention(**args, return_lse=True)
    assert out.shape == (b, m, 2, 4) and out.dtype == torch.bfloat16
    assert lse is not None and lse.shape == (b, 2, m)


@bad_inputs(
    Bad({"q": torch.zeros(2, 5, 8)}, "q", "shape [2, 5, 8]", "[B, M, H, D]"),
    Bad({"q": torch.zeros(2, 5, 2, 4, dtype=torch.int32)}, "q", "dtype int32", "dtype float32"),
    Bad({"k": torch.zeros(2, 7, 2, 8)}, "k", "shape [2, 7, 2, 8]", "[B, N, H, D] = [2, 7, 2, 4]"),
    Bad({"k": torch.zeros(2, 0, 2, 4)}, "k", "shape [2, 0, 2, 4]", "N >= 1"),
    Bad({"v": torch.zeros(2, 6, 2, 4)}, "v", "shape [2, 6, 2, 4]", "[B, N, H, D] = [2, 7, 2, 4]"),
    Bad({"v": torch.zeros(2, 7, 2, 4).half()}, "v", "dtype float16", "dtype float32"),
    Bad({"k_source": torch.zeros(2, 3, 8)}, "k_source", "shape [2, 3, 8]", "[1, 3, 2, 4] or [2, 3, 2, 4]"),
    Bad({"v_source": torch.zeros(1, 4, 2, 4)}, "v_source", "shape [1, 4, 2, 4]", "[1, 3, 2, 4]"),
    Bad({"k_source": torch.zeros(1, 3, 2, 4, dtype=torch.int8)}, "k_scale", "None", "because k_source is int8"),
    Bad({"v_scale": torch.ones(1, 3, 2)}, "v_scale", "a value", "None, because v_source is float32"),
    Bad({"index": int32(*range(8))}, "index", "8 rows", "at most N = 7"),
    Bad({"ratio": torch.ones(1)}, "ratio", "shape [1]", "[B] = [2]"),
    Bad({"scale": NAN}, "scale", "nan", "a finite number"),
    Bad({"scale": "1"}, "scale", "'1'", "a finite number"),
    Bad({"scale": 1e-46}, "scale", "1e-46", "0 or a finite number of size 1.2e-38 to 1e+38"),
    Bad({"scale": -3e38}, "scale", "-3e+38", "0 or a finite number of size 1.2e-38 to 1e+38"),
    Bad({"return_lse": None}, "return_lse", "None", "True or False"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    assert_refused(kv_lerp_attention, inputs((2, 1, 5, 7, 3, 2, 4), torch.float32), bad)


@bad_inputs(
    Bad({"k": torch.zeros(2, 7, 2, 4).half()}, "k", "dtype float16", "dtype float32"),
    Bad({"v": torch.zeros(2, 7, 2, 4).half()}, "v", "dtype float16", "dtype float32"),
    Bad({"k": torch.zeros(1, 7, 2, 4).expand(2, 7, 2, 4)}, "k", "expanded", "can be written"),
    Bad({"v": torch.zeros(1, 7, 2, 4).expand(2, 7, 2, 4)}, "v", "expanded", "can be written"),
    Bad({"v": torch.zeros(2, 6, 2, 4)}, "v", "shape [2, 6, 2, 4]", "[2, 7, 2, 4]"),
    Bad({"scale": NAN}, "scale", "nan", "a finite number"),
)
def test_bad_inputs_to_attention_in_place_are_named(bad: Bad) -> None:
    assert_refused(kv_lerp_attention_, inputs((2, 1, 5, 7, 3, 2, 4), torch.float32), bad)
