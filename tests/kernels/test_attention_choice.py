"""Which way a call of kv_lerp_attention goes on which GPU."""

import builtins
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from samples import int32, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings

from kvlock_kernels import kv_lerp_attention, reference

CUDNN = "torch CUDNN_ATTENTION"


def arguments(tokens: int = 70, dim: int = 32, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    q, k, v = (normal(1, tokens, 2, dim, seed=seed, dtype=dtype) for seed in range(3))
    sources = [normal(1, 2, 2, dim, seed=seed, dtype=dtype) for seed in (3, 4)]
    return [q, k, v, *sources, int32(5, 1), torch.tensor([0.3])]


@pytest.fixture
def way_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The way a call goes on a GPU of a compute capability; it does not go it."""
    from kvlock_kernels._triton import attend, hopper, plain

    gone: list[str] = []

    def noted(name: str) -> Any:
        return lambda q, *args, **options: (gone.append(name), q)

    def torch_attention(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        allowed = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
        gone.append(f"torch {allowed[0].name}")
        return q

    table = (line._replace(dim=32, tokens=1000) if attend.OWN in line.plain else line for line in attend.TABLE)
    monkeypatch.setattr(attend, "TABLE", tuple(table))
    monkeypatch.setattr(attend, "attend_in_loop", noted("in loop"))
    monkeypatch.setattr(attend, "attend_persistently_", lambda q, *args, **options: noted("one launch")(q)[1])
    monkeypatch.setattr(attend, "kv_lerp_pair_", lambda *args, **options: None)
    monkeypatch.setattr(hopper, "attention", noted("own kernel"))
    monkeypatch.setattr(hopper, "compile_for", lambda *call: None)
    monkeypatch.setattr(plain.F, "scaled_dot_product_attention", torch_attention)

    def call(capability: tuple[int, int], args: list[torch.Tensor], *, inplace: bool = False, **options: Any) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        function = attend.kv_lerp_attention_ if inplace else attend.kv_lerp_attention
        function(*args, **({"scale": 0.1} | options))
        assert len(gone) <= 1
        return gone.pop() if gone else "another package"

    plain.compiled_hopper.cache_clear()
    yield call
    plain.compiled_hopper.cache_clear()


@pytest.mark.parametrize("inplace", [False, True])
def test_many_keys_go_to_the_own_kernel_on_the_gpu_it_is_made_for(way_of: Any, inplace: bool) -> None:
    q, *rest = arguments(1000)
    assert way_of((9, 0), [q, *rest], inplace=inplace) == "own kernel"
    assert way_of((9, 0), [q[:, :999], *rest], inplace=inplace) == CUDNN
    assert way_of((9, 0), arguments(999), inplace=inplace) == CUDNN
    assert way_of((9, 0), arguments(1000, dim=64), inplace=inplace) == CUDNN


def test_torch_is_asked_for_what_is_fastest_on_a_gpu(way_of: Any) -> None:
    assert {way_of(capability, arguments(1000)) for capability in ((8, 0), (8, 9))} == {"torch FLASH_ATTENTION"}
    assert {way_of(capability, arguments(1000)) for capability in ((10, 0), (11, 0), (12, 0))} == {CUDNN}


FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """FlashAttention's packages, importable; the calls of it: generation and scale."""
    from kvlock_kernels._triton import plain

    calls: list[Any] = []

    def module(generation: int) -> ModuleType:
        def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> Any:
            calls.append((generation, softmax_scale))
            scores = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float()) * softmax_scale
            out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(3), v.float()).to(q.dtype)
            return (out, None) if generation == 4 else out

        found = ModuleType(FLASH_MODULES[generation])
        vars(found)["flash_attn_func"] = flash_attn_func
        return found

    for generation, name in FLASH_MODULES.items():
        monkeypatch.setitem(sys.modules, name, module(generation))
    plain.flash_attention.cache_clear()
    yield calls
    plain.flash_attention.cache_clear()


def test_flash_attention_is_not_asked_before_a_row_shows_it_right(way_of: Any, flash_attn: list[Any]) -> None:
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        assert way_of(capability, arguments(40)).startswith("torch")
    assert flash_attn == []


def test_what_cannot_be_imported_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlock_kernels._triton import plain

    plain.flash_attention.cache_clear()
    package = tmp_path / "flash_attn"
    package.mkdir()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (package / "__init__.py").write_text("import builtins\nbuiltins.kvlock_tries.append(1)\nNone.function\n")
    tries: list[int] = []
    monkeypatch.setattr(builtins, "kvlock_tries", tries, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert plain.flash_attention(plain.FLASH_2) is None and plain.flash_attention(plain.FLASH_2) is None
    assert tries == [1]
    plain.flash_attention.cache_clear()


@pytest.mark.parametrize("generation", [2, 3, 4])
def test_a_line_of_the_table_asks_for_any_generation(
    way_of: Any, flash_attn: list[Any], monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    from kvlock_kernels._triton import attend, plain

    flash = f"flash-attn {generation}"
    monkeypatch.setattr(attend, "TABLE", (attend.Choice(9, None, None, 0, attend.LERP_FIRST, (flash, *attend.TORCH)),))
    q, k, v, *rest = arguments()
    q, k, v = (4 * x for x in (q, k, v))
    exact, _ = reference.kv_lerp_attention(*(x.float() for x in (q, k, v, *rest[:2])), *rest[2:], scale=-0.1)
    monkeypatch.setattr(attend, "kv_lerp_pair_", reference.kv_lerp_pair_)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    out, _ = attend.kv_lerp_attention(q, k, v, *rest, scale=-0.1)
    assert flash_attn == [(generation, 0.1)]
    native, _ = reference.kv_lerp_attention(q, k, v, *rest, scale=-0.1)
    assert_as_accurate_as_torch(out, native, exact.double())
    monkeypatch.setitem(sys.modules, FLASH_MODULES[generation], None)
    plain.flash_attention.cache_clear()
    assert way_of((9, 0), [q, k, v, *rest]) == CUDNN


def test_what_flash_attention_does_not_take_goes_to_torch(
    way_of: Any, flash_attn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlock_kernels._triton import attend, plain

    line = attend.Choice(9, None, None, 0, attend.LERP_FIRST, (plain.FLASH_4, *attend.TORCH))
    monkeypatch.setattr(attend, "TABLE", (line,))
    q, k, *rest = arguments(40)
    odd = torch.cat([q, q], 3)[..., 4:36]  # rows that do not begin at 16 bytes
    assert way_of((10, 0), arguments(40, dtype=torch.float32)) == CUDNN
    assert way_of((10, 0), [q.bfloat16(), k, *rest]) == CUDNN
    assert way_of((10, 0), [odd, k, *rest]) == CUDNN
    assert way_of((10, 0), [q[:, :0], k, *rest]) == CUDNN
    assert {way_of((10, 0), arguments(40, dim=dim)) for dim in (4, 36, 136, 192)} == {CUDNN}
    assert flash_attn == []


@pytest.mark.parametrize("inplace", [False, True])
def test_a_line_of_the_table_sends_a_call_any_way(
    way_of: Any, monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    from kvlock_kernels._triton import attend

    few = [attend.Choice(8, None, 32, 0, attend.ONE_LAUNCH, ()), attend.Choice(8, None, 64, 0, attend.IN_LOOP, ())]
    packed = attend.Choice(8, torch.int8, None, 0, attend.IN_LOOP, ())
    monkeypatch.setattr(attend, "TABLE", (packed, *few, *attend.TABLE))
    assert way_of((8, 0), arguments(dim=32), inplace=inplace) == "one launch"
    assert way_of((8, 0), arguments(dim=64), inplace=inplace) == "in loop"
    assert way_of((8, 0), arguments(dim=128), inplace=inplace) == "torch FLASH_ATTENTION"
    q, k, v, *sources, index, ratio = arguments(dim=128)
    int8 = [source.to(torch.int8) for source in sources]
    assert way_of((8, 0), [q, k, v, *int8, index, ratio], inplace=inplace) == "in loop"


@pytest.mark.parametrize("return_lse", [False, True])
def test_without_gluon_the_others_stay(way_of: Any, monkeypatch: pytest.MonkeyPatch, return_lse: bool) -> None:
    monkeypatch.setitem(sys.modules, "kvlock_kernels._triton.hopper", None)
    monkeypatch.delattr("kvlock_kernels._triton.hopper")
    with pytest.warns(RuntimeWarning, match="does not compile the kernel for sm_90 .*Error: "):
        assert way_of((9, 0), arguments(1000), return_lse=return_lse) == ("in loop" if return_lse else CUDNN)


@pytest.mark.parametrize("return_lse", [False, True])
def test_where_triton_does_not_compile_it_the_others_stay(
    way_of: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, return_lse: bool
) -> None:
    asked: list[tuple[Any, ...]] = []

    def not_compiled(*call: Any) -> None:
        asked.append(call)
        try:
            raise RuntimeError("async_store was taken away\ncall another")
        except RuntimeError as error:
            raise ValueError("at 44:4") from error

    monkeypatch.setattr("kvlock_kernels._triton.hopper.compile_for", not_compiled)
    for _ in range(2):
        assert way_of((9, 0), arguments(1000), return_lse=return_lse) == ("in loop" if return_lse else CUDNN)
    assert asked == [(torch.float16, 2, 32)]
    (warned,) = recwarn
    reason = "does not compile the kernel for sm_90 (RuntimeError: async_store was taken away)"
    said = f"attention of 2 heads of 32 runs by other kernels: Triton {triton.__version__} {reason}"
    assert str(warned.message) == said


def test_what_the_own_kernel_does_not_take_goes_to_torch(way_of: Any) -> None:
    q, k, *rest = arguments(1000)
    assert way_of((9, 0), arguments(1000, dtype=torch.float32)) == CUDNN
    assert way_of((9, 0), [q.float(), k, *rest]) == CUDNN


def test_the_log_sum_exp_comes_from_a_kernel_that_gives_it(way_of: Any) -> None:
    assert way_of((9, 0), arguments(1000), return_lse=True) == "own kernel"
    assert way_of((9, 0), arguments(70), return_lse=True) == "in loop"  # where no row has shown the own kernel right
    assert way_of((9, 0), arguments(1000, dtype=torch.float32), return_lse=True) == "in loop"
    assert way_of((8, 0), arguments(2000), return_lse=True) == "in loop"


@pytest.mark.parametrize("implementation", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_torch_is_asked_with_a_scale_that_all_its_kernels_take(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """One that takes the maximum of what it has not yet multiplied overflows with a negative one, is NaN with zero."""
    from kvlock_kernels._triton import plain

    attention = plain.F.scaled_dot_product_attention

    def checked(*args: Any, scale: float) -> torch.Tensor:
        assert scale > 0
        return attention(*args, scale=scale)

    monkeypatch.setattr(plain.F, "scaled_dot_product_attention", checked)
    args = [x * 4 if x.is_floating_point() and x.ndim == 4 else x for x in arguments()]
    exact, _ = reference.kv_lerp_attention(*(x.float() if x.is_floating_point() else x for x in args), scale=scale)
    native, _ = reference.kv_lerp_attention(*args, scale=scale)
    assert_as_accurate_as_torch(kv_lerp_attention(*args, scale=scale).out, native, exact.double())


@pytest.mark.parametrize("implementation", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("tokens", [1000, 1], ids=["torch", "own-kernel"])
def test_keys_and_values_stay_as_they_are(
    tokens: int, return_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlock_kernels._triton import attend

    line = next(line for line in attend.TABLE if attend.OWN in line.plain)
    monkeypatch.setattr(attend, "TABLE", (line._replace(dim=32, tokens=tokens), *attend.TABLE))
    args = arguments()
    before = [arg.clone() for arg in args]
    out = kv_lerp_attention(*args, return_lse=return_lse).out
    for arg, kept in zip(args, before, strict=True):
        assert_bit_identical(arg, kept)
    exact, _ = reference.kv_lerp_attention(*(x.float() if x.is_floating_point() else x for x in args), scale=32**-0.5)
    native, _ = reference.kv_lerp_attention(*args, scale=32**-0.5)
    assert_as_accurate_as_torch(out, native, exact.double())


@pytest.mark.parametrize("implementation", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_keys_wider_than_queries_keep_their_range() -> None:
    """Rounded to the queries' dtype, as attention alone would want them, they would be infinite."""
    q, k, v, *rest = arguments()
    k, v = 1e5 * k.float(), v.float()
    out = kv_lerp_attention(q, k, v, *rest, scale=1e-5).out
    assert out.dtype == q.dtype
    exact, _ = reference.kv_lerp_attention(q.float(), k, v, *(x.float() for x in rest[:2]), *rest[2:], scale=1e-5)
    assert_within_roundings(out, exact.to(q.dtype), 2)
