"""Plain attention for sm_90: the values in the interpreter, the machine code of both kernels on no GPU at all."""

import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from absent_gpu import printed_by
from regimes import each_regime
from samples import NAN, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.offline import SHARED_LIMIT
from kvlock_kernels._triton import Unsupported, hopper

B, H = 2, 3
TOKENS = (1, 45, 128, 200, 257)  # single, within a tile, one full tile, ragged second, a tile of one row
DTYPES = (torch.bfloat16, torch.float16)
AXES = {"m": TOKENS, "n": TOKENS, "d": (24, 64, 96, 128), "dtype": DTYPES, "fused": (True, False), "scale": (None, 0.3)}


@pytest.fixture(autouse=True)
def gpu_in_the_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):
        yield
        return
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU; run them with -m gpu")
    with interpreter.bf16_as_on_a_gpu(), np.errstate(all="ignore"):
        yield


def inputs(m: int, n: int, d: int, dtype: torch.dtype, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, which lie in one tensor [B, N, 3, H, D] of other numbers if they are fused."""
    if fused:
        q = normal(B, m, 3, H, d, dtype=dtype)[:, :, 0]
        _, k, v = normal(B, n, 3, H, d, seed=1, dtype=dtype).unbind(2)
        return q, k, v
    return tuple(normal(B, rows, H, d, seed=seed, dtype=dtype) for seed, rows in enumerate((m, n, n)))


def plain_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (scale * torch.einsum("bmhd,bnhd->bhmn", q, k)).logsumexp(-1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def assert_right(attention: Callable[..., tuple[Tensor, Tensor]], regime: dict[str, Any]) -> None:
    q, k, v = inputs(*(regime[name] for name in ("m", "n", "d", "dtype", "fused")))
    scale = regime["scale"] or regime["d"] ** -0.5
    out, lse = attention(q, k, v, scale=scale, return_lse=True)
    doubles = (q.double(), k.double(), v.double())
    assert_as_accurate_as_torch(out, torch_attention(q, k, v, scale), torch_attention(*doubles, scale))
    native = plain_lse(q.float(), k.float(), scale)
    assert_as_accurate_as_torch(lse, native, plain_lse(*doubles[:2], scale))


@each_regime(AXES)
def test_it_is_as_accurate_as_torch(regime: dict[str, Any]) -> None:
    assert_right(hopper.attention, regime)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hopper", "hopper_gluon"])
@each_regime(AXES)
def test_on_its_own_gpu_it_is_as_accurate_as_torch(regime: dict[str, Any], name: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for sm_90")
    kernel = importlib.import_module(f"kvlock_kernels._triton.{name}")
    with torch.device("cuda"):
        assert_right(kernel.attention, regime)


@pytest.mark.parametrize("sign", [1, -1], ids=["high", "low"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_ten_thousand_do_not_overflow(dtype: torch.dtype, sign: int) -> None:
    """A key that is not there must not win against scores of -10000, as one with score 0 would."""
    q = torch.full((1, 1, 1, 64), 12.5, dtype=dtype)
    k, v = (sign * q).expand(1, 45, 1, 64), normal(1, 45, 1, 64, dtype=dtype)
    out, lse = hopper.attention(q, k, v, scale=1.0, return_lse=True)
    assert lse.item() == pytest.approx(sign * 10000 + math.log(45), abs=2e-3)
    assert_as_accurate_as_torch(out, torch_attention(q, k, v, 1.0), v.double().mean(1, keepdim=True))


def test_scores_of_both_signs_attend_to_the_highest() -> None:
    q, k, v = torch.ones(1, 1, 1, 64).half(), torch.ones(1, 200, 1, 64).half(), normal(1, 200, 1, 64).half()
    k[:, 1::2] = -1
    k[:, 130] = 2
    out, lse = hopper.attention(q, k, v, scale=1e4 / 64, return_lse=True)
    assert_bit_identical(out, v[:, 130:131])
    assert lse.item() == pytest.approx(20000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_beside_the_rows_is_not_read(dtype: torch.dtype) -> None:
    q, k, v = inputs(45, 130, 96, dtype)

    def among_nan(x: Tensor) -> Tensor:
        around = torch.full((B, x.shape[1] + 128, H + 1, 128), NAN, dtype=dtype)
        return around[:, : x.shape[1], :H, :96].copy_(x)

    expected = hopper.attention(q, k, v, scale=0.1, return_lse=True)
    actual = hopper.attention(*map(among_nan, (q, k, v)), scale=0.1, return_lse=True)
    assert_bit_identical(actual[0], expected[0])
    assert_bit_identical(actual[1], expected[1])


def test_what_lies_behind_the_results_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = []

    def in_a_larger_one(shape: tuple[int, ...], **options: Any) -> Tensor:
        larger = torch.full((shape[0] + 1, *shape[1:]), 7.0, **options)
        behind.append(larger[-1])
        return larger[:-1]

    args = inputs(45, 45, 64, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", in_a_larger_one)
        hopper.attention(*args, scale=0.1, return_lse=True)
    assert len(behind) == 2 and all((rows == 7).all() for rows in behind)


def test_rows_that_a_descriptor_cannot_address_are_copied() -> None:
    """Rows 132 bytes apart, elements 4 bytes apart, an address off by 2 bytes, and one row for all tokens."""
    q, k, v = inputs(45, 45, 64, torch.float16)
    memory = torch.zeros(B * 45 * H * 128 + 1, dtype=torch.float16)

    def laid_out(x: Tensor, *strides: int, start: int = 0) -> Tensor:
        return memory.clone().as_strided(x.shape, strides, start).copy_(x)

    expected, _ = hopper.attention(q, k, v, scale=0.1, return_lse=False)
    for strides, start in (((45 * H * 66, H * 66, 66, 1), 0), ((45 * H * 128, H * 128, 128, 2), 0), (q.stride(), 1)):
        odd = (laid_out(x, *strides, start=start) for x in (q, k, v))
        assert_bit_identical(hopper.attention(*odd, scale=0.1, return_lse=False)[0], expected)
    assert hopper.described(q) is q
    assert hopper.described(k[:, :1].expand_as(k)).is_contiguous()


def test_the_log_sum_exp_is_empty_where_nobody_asks_for_it() -> None:
    args = inputs(45, 45, 64, torch.float16)
    out, lse = hopper.attention(*args, scale=0.1, return_lse=False)
    assert lse.shape == (0,) and lse.dtype == torch.float32
    assert_bit_identical(out, hopper.attention(*args, scale=0.1, return_lse=True)[0])


@pytest.mark.parametrize(("b", "m"), [(0, 5), (2, 0)], ids=["B0", "M0"])
def test_no_samples_or_no_queries_give_empty_results(b: int, m: int) -> None:
    q, kv = torch.empty(b, m, H, 64).half(), torch.empty(b, 5, H, 64).half()
    out, lse = hopper.attention(q, kv, kv, scale=0.1, return_lse=True)
    assert out.shape == (b, m, H, 64) and lse.shape == (b, H, m)


def test_the_allocator_of_the_caller_stays() -> None:
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    hopper.attention(*inputs(1, 1, 64, torch.float16), scale=0.1, return_lse=False)
    assert _allocation._allocator.get() is before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"d": 136}, "head dimension 136"),
        ({"d": 36}, "head dimension 36"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"scale": -1.0}, "scale -1.0"),
    ],
    ids=["fp32", "D136", "D36", "scale0", "negative"],
)
def test_what_the_kernel_does_not_take_is_named(change: dict[str, Any], reason: str) -> None:
    options = {"dtype": torch.float16, "d": 64, "scale": 0.1} | change
    x = normal(1, 5, 1, options["d"], dtype=options["dtype"])
    with pytest.raises(Unsupported, match=reason):
        hopper.attention(x, x, x, scale=options["scale"], return_lse=False)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What hopper_machine_code.py prints."""
    return printed_by(str(Path(__file__).with_name("hopper_machine_code.py")))


def test_no_kernel_spills_and_every_warp_group_has_its_role(compiled: list[dict[str, Any]]) -> None:
    """Where Triton does not specialise it says nothing: the four warps that were asked for stay four."""
    for kernel in compiled:
        assert kernel["spills"] == 0 and kernel["warps"] == 12, kernel
        assert kernel["hgmma"] > 0 and kernel["shared"] <= SHARED_LIMIT[90], kernel


def test_the_gluon_kernel_computes_weights_while_pv_runs(compiled: list[dict[str, Any]]) -> None:
    """64 exponentials a thread, between the end of QK with PV still in flight and the end of PV, in both consumers."""
    for kernel in compiled:
        if kernel["module"] == "hopper_gluon":
            assert len(kernel["overlaps"]) == 2 and min(kernel["overlaps"]) >= 64, kernel
