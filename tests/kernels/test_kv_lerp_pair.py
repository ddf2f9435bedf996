"""kv_lerp_pair_: source rows mixed into keys and values at once."""

from typing import Any

import pytest
import torch
from refusals import Bad, assert_refused, bad_inputs
from regimes import each_regime, rows_of, sources_of_values
from samples import int32, normal, source_rows
from tolerance import assert_bit_identical

from kvlock_kernels import kv_lerp_, kv_lerp_pair_

EACH_IMPLEMENTATION = True


@each_regime()
def test_the_pair_has_the_bits_of_two_single_lerps(regime: dict[str, Any]) -> None:
    n, h, d, dtype = (regime[name] for name in ("tokens", "heads", "dim", "dtype"))
    (b, sources), (source_dtype, mean) = regime["samples"], regime["source"]
    k, v = normal(b, n, 2, h, d, dtype=dtype)[:, :, 0], normal(b, n, 3, h, d, seed=5, dtype=dtype)[:, :, 1]
    if regime["contiguous"]:
        k, v = k.contiguous(), v.contiguous().flatten(2)
    (index, _), ratio = rows_of(n, regime["share"]), torch.tensor([regime["ratio"], 0.77])[:b]
    k_source, k_options, _ = source_rows(source_dtype, sources, len(index), h, d, mean=mean)
    sources, source_dtype, mean = sources_of_values(regime)
    v_source, v_options, _ = source_rows(source_dtype, sources, len(index), h, d, mean=mean, seed=2)
    expected_k = kv_lerp_(k.clone(), k_source, index, ratio, **k_options)
    expected_v = kv_lerp_(v.clone(), v_source, index, ratio, **v_options)
    options = {name.replace("source", "k"): value for name, value in k_options.items()}
    options |= {name.replace("source", "v"): value for name, value in v_options.items()}
    pair = kv_lerp_pair_(k, v, k_source, v_source, index, ratio, **options)
    assert pair.k is k and pair.v is v
    assert_bit_identical(k, expected_k)
    assert_bit_identical(v, expected_v)


def test_keys_and_values_may_be_slices_of_one_projection() -> None:
    fused = normal(2, 7, 3, 2, 4)
    before, index, ratio = fused.clone(), int32(6, 0, 3), torch.tensor([0.3, 1.0])
    k_source, v_source = normal(2, 3, 2, 4, seed=1), normal(2, 3, 2, 4, seed=2)
    expected = kv_lerp_pair_(before[:, :, 1].clone(), before[:, :, 2].clone(), k_source, v_source, index, ratio)
    q, k, v = fused.unbind(2)
    kv_lerp_pair_(k, v, k_source, v_source, index, ratio)
    assert_bit_identical(q, before[:, :, 0])
    assert_bit_identical(k, expected.k)
    assert_bit_identical(v, expected.v)


def test_the_flat_layout_is_taken() -> None:
    k, v = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    kv_lerp_pair_(k, v, torch.ones(1, 1, 8), torch.full((1, 1, 2, 4), 3.0), int32(2), torch.tensor([0.5]))
    assert k.sum(-1).tolist() == [[0, 0, 4, 0]]
    assert v.sum(-1).tolist() == [[0, 0, 12, 0]]


def test_an_empty_input_changes_nothing() -> None:
    k, v, none = normal(2, 7, 2, 4), normal(2, 7, 2, 4, seed=1), torch.empty(2, 0, 2, 4)
    pair = kv_lerp_pair_(k.clone(), v.clone(), none, none, int32(), torch.ones(2))
    assert_bit_identical(pair.k, k)
    assert_bit_identical(pair.v, v)


INT8 = torch.zeros(1, 3, 2, 4, dtype=torch.int8)


@bad_inputs(
    Bad({"k": torch.zeros(2, 7)}, "k", "shape [2, 7]", "[B, N, H, D] or [B, N, C]"),
    Bad({"v": torch.zeros(2, 7, 2, 4, dtype=torch.int64)}, "v", "dtype int64", "dtype float32"),
    Bad({"v": torch.zeros(3, 7, 2, 4)}, "ratio", "shape [2]", "[B] = [3]"),
    Bad({"k_source": torch.zeros(1, 2, 2, 4)}, "k_source", "shape [1, 2, 2, 4]", "[1, 3, 2, 4]"),
    Bad({"v_source": torch.zeros(1, 2, 2, 4)}, "v_source", "shape [1, 2, 2, 4]", "[1, 3, 2, 4]"),
    Bad({"k_source": INT8}, "k_scale", "None", "[B, rows, H] fp32, because k_source is int8"),
    Bad({"v_source": INT8}, "v_scale", "None", "[B, rows, H] fp32, because v_source is int8"),
    Bad({"k_mean": torch.ones(1, 2, 4)}, "k_mean", "a value", "None, because k_source is float32"),
    Bad({"v_mean": torch.ones(1, 2, 4)}, "v_mean", "a value", "None, because v_source is float32"),
    Bad({"index": torch.arange(3)}, "index", "dtype int64", "dtype int32"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    good = {
        "k": torch.zeros(2, 7, 2, 4),
        "v": torch.zeros(2, 7, 2, 4),
        "k_source": torch.zeros(1, 3, 2, 4),
        "v_source": torch.zeros(1, 3, 2, 4),
        "index": int32(0, 2, 4),
        "ratio": torch.ones(2),
    }
    assert_refused(kv_lerp_pair_, good, bad)


def test_a_refused_pair_leaves_the_keys_alone() -> None:
    k, v, source = normal(2, 7, 2, 4), normal(2, 7, 2, 4, seed=1), normal(1, 3, 2, 4, seed=2)
    before = k.clone()
    with pytest.raises(ValueError, match="v_source"):
        kv_lerp_pair_(k, v, source, source[:, :2], int32(0, 2, 4), torch.ones(2))
    assert_bit_identical(k, before)
