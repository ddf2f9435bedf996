"""What the dispatcher finds on CUDA: the kernels, or the reference with one warning that says why."""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from samples import CALLS, int32, normal, projections
from serving import served
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
    _cuda.warn_of.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _cuda.why_not.cache_clear()
    _cuda.warn_of.cache_clear()
    _cuda.launchers.cache_clear()


def lerp(dim: int = 8) -> tuple[torch.Tensor, ...]:
    return normal(1, 5, 2, dim), normal(1, 2, 2, dim, seed=1), int32(3, 1), torch.tensor([0.3])


def norm_rope(heads: int = 2, dim: int = 4) -> tuple[torch.Tensor, ...]:
    sources = (normal(1, 2, heads, dim, seed=seed) for seed in (6, 7))
    return *projections(1, 3, heads, dim), *sources, int32(1, -1, 0), torch.tensor([0.3])


def assert_falls_back(message: str, name: str, args: tuple[torch.Tensor, ...], **options: float) -> None:
    """Wants one warning with this message, which is a regular expression, and what the reference gives."""
    expected = [x.clone() for x in args]
    getattr(reference, name)(*expected, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _cuda.implementation(name)(*args, **options)
    (warning,) = caught
    assert warning.category is RuntimeWarning and re.fullmatch(message, str(warning.message)), warning.message
    for one, other in zip(args, expected, strict=True):
        assert_bit_identical(one, other)


def assert_device_falls_back(reason: str) -> None:
    assert_falls_back(f"the operators run as plain PyTorch on cpu: {reason}", "kv_lerp_", lerp())


def test_every_operator_with_a_kernel_is_registered_on_cuda() -> None:
    assert set(_cuda.launchers()) == set(_cuda.OPERATORS)
    for name in _cuda.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{_ops.NAMESPACE}::{name}", "CUDA")


def test_a_gpu_too_old_falls_back_with_its_capability(modern_gpu: pytest.MonkeyPatch) -> None:
    modern_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert_device_falls_back(r"the GPU has compute capability 7\.5, the kernels need 8\.0")


def test_a_device_without_kernels_warns_once_for_all_operators(modern_gpu: pytest.MonkeyPatch) -> None:
    modern_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    operators = {name: _cuda.implementation(name) for name in _cuda.OPERATORS}
    with warnings.catch_warnings(record=True) as caught, served(operators):
        warnings.simplefilter("always")
        for name, make in CALLS.values():
            call = make()
            getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
    (warning,) = caught
    assert "compute capability 7.5" in str(warning.message)


def test_a_missing_triton_falls_back_with_the_command_that_installs_it(modern_gpu: pytest.MonkeyPatch) -> None:
    _cuda.launchers.cache_clear()
    for name in [name for name in sys.modules if name.startswith("kvlock_kernels._triton.")]:
        modern_gpu.delitem(sys.modules, name)
        modern_gpu.delattr(sys.modules["kvlock_kernels._triton"], name.rsplit(".", 1)[1], raising=False)
    modern_gpu.setitem(sys.modules, "triton", None)
    assert_device_falls_back("Triton cannot be imported .*pip install triton")


def test_a_triton_that_cannot_start_falls_back_with_its_reason(modern_gpu: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise RuntimeError("Failed to find C compiler. Set CC.\nTraceback")

    modern_gpu.setattr(_cuda, "start_triton", start)
    assert_device_falls_back(r"Triton cannot be started \(Failed to find C compiler. Set CC.\)")


def test_a_gpu_of_another_maker_falls_back(modern_gpu: pytest.MonkeyPatch) -> None:
    modern_gpu.setattr(torch.version, "hip", "7.0")
    assert_device_falls_back("the kernels are made for NVIDIA GPUs")


def test_a_head_too_large_falls_back_before_anything_is_written(modern_gpu: pytest.MonkeyPatch) -> None:
    message = "kv_lerp_ runs as plain PyTorch: head dimension 257; the kernels take at most 256"
    assert_falls_back(message, "kv_lerp_", lerp(257))


TOO_LARGE = {
    (65, 128): "65 heads of dimension 128; the kernel takes at most 8192 elements a token",
    (1, 258): "head dimension 258; the kernel takes at most 256",
}


@pytest.mark.parametrize(("shape", "reason"), TOO_LARGE.items(), ids=["65-heads", "258-wide"])
def test_a_token_too_large_for_the_norm_pass_falls_back(
    modern_gpu: pytest.MonkeyPatch, shape: tuple[int, int], reason: str
) -> None:
    message = f"qk_norm_rope_kv_lerp_ runs as plain PyTorch: {reason}"
    assert_falls_back(message, "qk_norm_rope_kv_lerp_", norm_rope(*shape), eps=1e-6)


@pytest.mark.parametrize("scattered", range(3), ids="qkv")
def test_channels_that_are_not_side_by_side_fall_back(modern_gpu: pytest.MonkeyPatch, scattered: int) -> None:
    args = list(norm_rope())
    args[scattered] = torch.stack([args[scattered]] * 2, -1).flatten(2)[..., ::2]
    reason = "projections whose channels are not side by side in memory"
    message = f"qk_norm_rope_kv_lerp_ runs as plain PyTorch: {reason}"
    assert_falls_back(message, "qk_norm_rope_kv_lerp_", tuple(args), eps=1e-6)


def test_one_reason_warns_once(modern_gpu: pytest.MonkeyPatch) -> None:
    run = _cuda.implementation("kv_lerp_")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            run(*lerp(257))
    assert len(caught) == 1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["A100", "H200"])
@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS.values()} & set(_cuda.OPERATORS)))
def test_a_modern_gpu_gets_the_kernel(modern_gpu: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    called = []
    modern_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
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
