"""Plain attention for sm_90: its values on such a GPU; without one its machine code, and what it refuses."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from absent_gpu import printed_by
from evaluations import draws, log_sum_exps
from regimes import each_regime
from samples import NAN, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.offline import SHARED_LIMIT
from kvlock_kernels._triton import Unsupported, hopper, plain

B, H = 2, 3
TOKENS = (1, 45, 128, 200, 257)  # single, within a tile, one full tile, ragged second, a tile of one row
DTYPES = (torch.bfloat16, torch.float16)
AXES = {"m": TOKENS, "n": TOKENS, "d": (24, 64, 96, 128), "dtype": DTYPES, "fused": (True, False), "scale": (None, 0.3)}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def gpu() -> Any:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for sm_90")
    with torch.device("cuda"):
        yield


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.usefixtures("gpu")(test))


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the kernel is made for, on which nothing is launched."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def inputs(
    m: int, n: int, d: int, dtype: torch.dtype, fused: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, which lie in one tensor [B, N, 3, H, D] of other numbers if they are fused."""
    if fused:
        q = normal(B, m, 3, H, d, seed=seed, dtype=dtype)[:, :, 0]
        _, k, v = normal(B, n, 3, H, d, seed=seed + 1, dtype=dtype).unbind(2)
        return q, k, v
    return tuple(normal(B, rows, H, d, seed=seed + i, dtype=dtype) for i, rows in enumerate((m, n, n)))


def plain_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (scale * torch.einsum("bmhd,bnhd->bhmn", q, k)).logsumexp(-1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


@on_gpu
@each_regime(AXES)
def test_it_is_as_accurate_as_torch(regime: dict[str, Any]) -> None:
    scale = regime["scale"] or regime["d"] ** -0.5
    actual, native, exact = [], [], []
    for draw in draws(B * H * regime["m"]):
        q, k, v = inputs(*(regime[name] for name in ("m", "n", "d", "dtype", "fused")), seed=10 * draw)
        out, lse = hopper.attention(q, k, v, scale=scale, return_lse=True)
        doubles = (q.double(), k.double(), v.double())
        assert_as_accurate_as_torch(out, torch_attention(q, k, v, scale), torch_attention(*doubles, scale))
        actual.append(lse)
        native.append(torch.stack(log_sum_exps(q, k, scale)))
        exact.append(plain_lse(*doubles[:2], scale))
    assert_as_accurate_as_torch(torch.cat(actual), torch.cat(native, 1).unbind(), torch.cat(exact))


@on_gpu
@pytest.mark.parametrize("sign", [1, -1], ids=["high", "low"])
@each_dtype
def test_scores_of_ten_thousand_do_not_overflow(dtype: torch.dtype, sign: int) -> None:
    """A key that is not there must not win against scores of -10000, as one with score 0 would."""
    q = torch.full((1, 1, 1, 64), 12.5, dtype=dtype)
    k, v = (sign * q).expand(1, 45, 1, 64), normal(1, 45, 1, 64, dtype=dtype)
    out, lse = hopper.attention(q, k, v, scale=1.0, return_lse=True)
    assert_within_roundings(lse.cpu().flatten(), torch.tensor([sign * 10000 + math.log(45)], device="cpu"), 2)
    assert_as_accurate_as_torch(out, torch_attention(q, k, v, 1.0), v.double().mean(1, keepdim=True))


@on_gpu
def test_scores_of_both_signs_attend_to_the_highest() -> None:
    q, k, v = torch.ones(1, 1, 1, 64).half(), torch.ones(1, 200, 1, 64).half(), normal(1, 200, 1, 64).half()
    k[:, 1::2] = -1
    k[:, 130] = 2
    out, lse = hopper.attention(q, k, v, scale=1e4 / 64, return_lse=True)
    assert_bit_identical(out, v[:, 130:131])
    assert_within_roundings(lse.cpu().flatten(), torch.tensor([20000.0], device="cpu"), 2)


@on_gpu
@each_dtype
def test_what_lies_beside_the_rows_is_not_read(dtype: torch.dtype) -> None:
    q, k, v = inputs(45, 130, 96, dtype)

    def among_nan(x: Tensor) -> Tensor:
        around = torch.full((B, x.shape[1] + 128, H + 1, 128), NAN, dtype=dtype)
        return around[:, : x.shape[1], :H, :96].copy_(x)

    expected = hopper.attention(q, k, v, scale=0.1, return_lse=True)
    actual = hopper.attention(*map(among_nan, (q, k, v)), scale=0.1, return_lse=True)
    assert_bit_identical(actual[0], expected[0])
    assert_bit_identical(actual[1], expected[1])


@on_gpu
def test_what_lies_behind_the_results_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    args, behind, empty = inputs(45, 45, 64, torch.float16), [], torch.empty

    def in_a_larger_one(shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.int8:  # the memory of the descriptors
            return empty(shape, **options)
        larger = torch.full((shape[0] + 1, *shape[1:]), 7.0, **options)
        behind.append(larger[-1])
        return larger[:-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", in_a_larger_one)
        hopper.attention(*args, scale=0.1, return_lse=True)
    assert len(behind) == 2 and all((rows == 7).all() for rows in behind)


@on_gpu
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


@on_gpu
def test_results_are_the_same_every_time_and_with_or_without_the_log_sum_exp() -> None:
    args = inputs(300, 1000, 128, torch.bfloat16)
    out, lse = hopper.attention(*args, scale=0.1, return_lse=False)
    assert lse.shape == (0,) and lse.dtype == torch.float32
    for _ in range(20):
        assert_bit_identical(hopper.attention(*args, scale=0.1, return_lse=True)[0], out)


@on_gpu
def test_the_allocator_of_the_caller_stays_and_a_graph_can_capture_it() -> None:
    from triton.runtime import _allocation

    before, args = _allocation._allocator.get(), inputs(45, 300, 64, torch.float16)
    expected, _ = hopper.attention(*args, scale=0.1, return_lse=False)
    assert _allocation._allocator.get() is before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = hopper.attention(*args, scale=0.1, return_lse=False)
    graph.replay()
    assert_bit_identical(out, expected)


def test_tensors_that_a_descriptor_can_address_are_not_copied() -> None:
    q, k, _ = inputs(45, 45, 64, torch.float16)
    assert hopper.described(q) is q
    assert hopper.described(k[:, :1].expand_as(k)).is_contiguous()


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(("b", "m"), [(0, 5), (2, 0)], ids=["B0", "M0"])
def test_no_samples_or_no_queries_give_empty_results(b: int, m: int) -> None:
    q, kv = torch.empty(b, m, H, 64).half(), torch.empty(b, 5, H, 64).half()
    out, lse = hopper.attention(q, kv, kv, scale=0.1, return_lse=True)
    assert out.shape == (b, m, H, 64) and lse.shape == (b, H, m)


@pytest.mark.usefixtures("absent")
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


@pytest.mark.parametrize("capability", [(8, 9), (10, 0)], ids=str)
def test_another_gpu_is_refused(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    x = normal(1, 5, 1, 64, dtype=torch.float16)
    with pytest.raises(Unsupported, match=f"compute capability {capability[0]}.{capability[1]}"):
        hopper.attention(x, x, x, scale=0.1, return_lse=False)


@on_gpu
@each_dtype
def test_this_triton_compiles_it(dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    q, k, _ = inputs(45, 45, 128, dtype)
    assert plain.own_kernel(q, k, 0.1) is hopper.attention and not recwarn.list


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What hopper_machine_code.py prints."""
    return printed_by(str(Path(__file__).with_name("hopper_machine_code.py")))


@pytest.fixture
def compiled(printed: dict[str, Any]) -> list[dict[str, Any]]:
    return printed["kernels"]


def test_it_does_not_spill_and_every_warp_group_has_its_role(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["spills"] == 0 and kernel["warps"] == 12, kernel
        assert kernel["hgmma"] > 0 and kernel["shared"] <= SHARED_LIMIT[90], kernel


def test_it_computes_weights_while_pv_runs(compiled: list[dict[str, Any]]) -> None:
    """64 exponentials a thread, between the end of QK with PV still in flight and the end of PV, in both consumers."""
    for kernel in compiled:
        assert len(kernel["overlaps"]) == 2 and min(kernel["overlaps"]) >= 64, kernel


def test_what_is_compiled_to_find_out_is_what_longer_calls_run(printed: dict[str, Any]) -> None:
    assert printed["found out by the same kernel"] is True


def test_a_name_that_triton_took_away_is_the_reason_given(printed: dict[str, Any]) -> None:
    said = r"does not compile the kernel for sm_90 \(.*no attribute 'warp_specialize'"
    assert re.search(said, printed["without a name"])
