"""What the dispatcher finds on CUDA: the kernels, or the reference with one warning that says why."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from samples import CALLS, int32, normal
from tolerance import assert_bit_identical

import kvlock_kernels
from kvlock_kernels import _cuda, _ops, reference


@pytest.fixture
def modern_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """CPU tensors pass for those of an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_cuda, "start_triton", lambda: None)
    _cuda.why_not.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _cuda.why_not.cache_clear()
    _cuda.launchers.cache_clear()


def lerp(dim: int = 8) -> tuple[torch.Tensor, ...]:
    return normal(1, 5, 2, dim), normal(1, 2, 2, dim, seed=1), int32(3, 1), torch.tensor([0.3])


def assert_falls_back(reason: str, *, dim: int = 8) -> None:
    x, *rest = lerp(dim)
    expected = x.clone()
    reference.kv_lerp_(expected, *rest)
    with pytest.warns(RuntimeWarning, match=f"kv_lerp_ runs as plain PyTorch: {reason}"):
        _cuda.implementation("kv_lerp_")(x, *rest)
    assert_bit_identical(x, expected)


def test_every_operator_with_a_kernel_is_registered_on_cuda() -> None:
    assert set(_cuda.launchers()) == set(_cuda.OPERATORS)
    for name in _cuda.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{_ops.NAMESPACE}::{name}", "CUDA")


def test_a_gpu_too_old_falls_back_with_its_capability(modern_gpu: pytest.MonkeyPatch) -> None:
    modern_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert_falls_back(r"the GPU has compute capability 7\.5, the kernels need 8\.0")


def test_a_missing_triton_falls_back_with_the_command_that_installs_it(modern_gpu: pytest.MonkeyPatch) -> None:
    _cuda.launchers.cache_clear()
    for name in [name for name in sys.modules if name.startswith("kvlock_kernels._triton.")]:
        modern_gpu.delitem(sys.modules, name)
        modern_gpu.delattr(sys.modules["kvlock_kernels._triton"], name.rsplit(".", 1)[1], raising=False)
    modern_gpu.setitem(sys.modules, "triton", None)
    assert_falls_back("Triton cannot be imported .*pip install triton")


def test_a_triton_that_cannot_start_falls_back_with_its_reason(modern_gpu: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise RuntimeError("Failed to find C compiler. Set CC.\nTraceback")

    modern_gpu.setattr(_cuda, "start_triton", start)
    assert_falls_back(r"Triton cannot be started \(Failed to find C compiler. Set CC.\)$")


def test_a_gpu_of_another_maker_falls_back(modern_gpu: pytest.MonkeyPatch) -> None:
    modern_gpu.setattr(torch.version, "hip", "7.0")
    assert_falls_back("the kernels are made for NVIDIA GPUs")


def test_a_head_too_large_falls_back_before_anything_is_written(modern_gpu: pytest.MonkeyPatch) -> None:
    assert_falls_back("head dimension 257; the kernels take at most 256", dim=257)


def test_one_reason_warns_once(modern_gpu: pytest.MonkeyPatch) -> None:
    run = _cuda.implementation("kv_lerp_")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            run(*lerp(257))
    assert len(caught) == 1


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS.values()} & set(_cuda.OPERATORS)))
def test_a_modern_gpu_gets_the_kernel(modern_gpu: pytest.MonkeyPatch, name: str) -> None:
    called = []
    modern_gpu.setattr(_cuda, "launchers", lambda: {name: lambda *args, **kwargs: called.append(args)})
    argument = torch.ones(1)
    _cuda.implementation(name)(argument)
    assert called == [(argument,)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "make"), CALLS.values(), ids=CALLS.keys())
def test_no_operator_waits_for_the_gpu_and_all_can_be_captured(name, make) -> None:
    with torch.device("cuda"):
        call, captured = make(), make()
        function = getattr(kvlock_kernels, name)
        function(*make().args, **call.kwargs)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = function(*call.args, **call.kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*captured.args, **captured.kwargs)
        graph.replay()
        torch.cuda.synchronize()
    flat = torch.utils._pytree.tree_leaves
    for one, other in zip(flat((result, captured)), flat((expected, call)), strict=True):
        if isinstance(one, torch.Tensor) and one.is_cuda:
            assert_bit_identical(one, other)
