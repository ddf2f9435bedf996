"""What every operator owes the dispatcher, the compiler, the device queue and the importing process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMPLEMENTATIONS
from samples import CALLS, Call
from tolerance import assert_bit_identical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import kvlock_kernels
from kvlock_kernels import reference

each_call = pytest.mark.parametrize(("name", "make"), CALLS.values(), ids=CALLS.keys())
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
# What serves the CPU in a plain run is the extension where it was built.
everywhere = pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "extension"), indirect=True)

MUTATED = {
    "kv_lerp_": [0],
    "kv_lerp_pair_": [0, 1],
    "kv_lerp_attention_": [1, 2],
    "windowed_variance_": [1],
    "qk_norm_rope_kv_lerp_": [0, 1, 2],
    "qk_norm_rope_kv_pack_": [0, 1],
}
FIRST_CALL = dict(reversed(CALLS.values()))
each_in_place_call = pytest.mark.parametrize(
    ("name", "make"), [(name, FIRST_CALL[name]) for name in MUTATED], ids=MUTATED
)
HANDED_BACK = ("kv_lerp_", "kv_lerp_pair_", "qk_norm_rope_kv_lerp_")  # the changed tensors are the result
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class RecordCalls(TorchDispatchMode):
    """Keeps the arguments with which a public function calls its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kvlock_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class RefuseSynchronisation(TorchDispatchMode):
    """Raises where the host would wait for a value, looking into the operators' implementation too.

    Below the operator composite functions such as item() arrive whole; they are taken apart, so one name is enough.
    """

    waiting = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
    indexing = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "kvlock_kernels":
                return getattr(reference, func._opname)(*args, **kwargs)
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        by_mask = func.overloadpacket in self.indexing and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func.overloadpacket in self.waiting:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


def tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def test_the_table_of_calls_covers_every_public_function() -> None:
    functions = {name for name in kvlock_kernels.__all__ if name[0].islower()}
    assert functions == {name for name, _ in CALLS.values()}


@each_implementation
@each_call
def test_opcheck_accepts_the_contract(name: str, make: Callable[[], Call]) -> None:
    call = make()
    with RecordCalls() as record:
        getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
    ((func, args, kwargs),) = record.calls
    # torch's schema test compares the arguments before and after with allclose, which fp8 lacks.
    fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors(args, kwargs, call))
    torch.library.opcheck(func, args, kwargs, test_utils=OPCHECKS[1:] if fp8 else OPCHECKS)


@each_call
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_fullgraph_compile_gives_the_bits_of_eager(name: str, make: Callable[[], Call], dynamic: bool) -> None:
    torch.compiler.reset()
    function, eager, compiled = getattr(kvlock_kernels, name), make(), make()
    expected = function(*eager.args, **eager.kwargs)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(
        *compiled.args, **compiled.kwargs
    )
    assert type(actual) is type(expected)
    for a, b in zip(tensors(actual, *compiled), tensors(expected, *eager), strict=True):
        assert_bit_identical(a, b)


@each_call
def test_it_compiles_inside_a_device_context(name: str, make: Callable[[], Call]) -> None:
    torch.compiler.reset()
    call = make()
    with torch.device("cpu"):
        torch.compile(getattr(kvlock_kernels, name), fullgraph=True, backend="eager")(*call.args, **call.kwargs)


@each_implementation
@each_call
def test_autocast_changes_neither_dtypes_nor_bits(name: str, make: Callable[[], Call]) -> None:
    plain, cast = make(), make()
    expected = getattr(kvlock_kernels, name)(*plain.args, **plain.kwargs)
    with torch.autocast(torch.get_default_device().type, torch.float16):
        actual = getattr(kvlock_kernels, name)(*cast.args, **cast.kwargs)
    for a, b in zip(tensors(actual, *cast), tensors(expected, *plain), strict=True):
        assert_bit_identical(a, b)


@each_call
def test_nothing_waits_for_the_device(name: str, make: Callable[[], Call]) -> None:
    call = make()
    with RefuseSynchronisation():
        getattr(kvlock_kernels, name)(*call.args, **call.kwargs)


@each_implementation
@each_call
def test_results_are_contiguous_and_share_no_memory_with_arguments(name: str, make: Callable[[], Call]) -> None:
    call = make()
    arguments = tensors(*call)
    results = tensors(getattr(kvlock_kernels, name)(*call.args, **call.kwargs))
    for result in results:
        assert result.is_contiguous()
        shared = any(result.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in arguments)
        assert shared == (name in HANDED_BACK)


@each_implementation
@each_call
def test_only_the_tensors_named_in_the_schema_change(name: str, make: Callable[[], Call]) -> None:
    mutated = MUTATED.get(name, [])
    call, before = make(), make()
    getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
    for i, (argument, original) in enumerate(zip(tensors(*call), tensors(*before), strict=True)):
        if i in mutated:
            assert not torch.equal(argument, original)
        else:
            assert_bit_identical(argument, original)


@each_in_place_call
@everywhere
def test_a_change_in_place_is_counted_once(name: str, make: Callable[[], Call]) -> None:
    """By the count autograd sees that a tensor it kept was changed."""
    for mode in (torch.enable_grad, torch.inference_mode):
        call = make()
        before = [call.args[i]._version for i in MUTATED[name]]
        with mode():
            getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
        assert [call.args[i]._version for i in MUTATED[name]] == [version + 1 for version in before]


@each_in_place_call
@everywhere
def test_a_leaf_that_requires_a_gradient_is_refused_as_torch_refuses_it(name: str, make: Callable[[], Call]) -> None:
    for i in MUTATED[name]:
        call, before = make(), make()
        call.args[i].requires_grad_()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            getattr(kvlock_kernels, name)(*call.args, **call.kwargs)
        assert_bit_identical(call.args[i].detach(), before.args[i])
        with torch.no_grad():
            getattr(kvlock_kernels, name)(*call.args, **call.kwargs)


@everywhere
def test_a_gradient_flows_through_a_lerp_whatever_serves_it() -> None:
    x, source = torch.ones(1, 3, 1, 2, requires_grad=True), torch.zeros(1, 2, 1, 2, requires_grad=True)
    rows = kvlock_kernels.kv_lerp_(x * 1, source, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0.25]))
    rows.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.75, 0.75, 1, 1, 0.75, 0.75]
    assert source.grad is not None and source.grad.flatten().tolist() == [0.25] * 4


def test_source_rows_may_be_a_view_of_the_tensor_that_is_changed() -> None:
    """The source row of a [source, edit] batch serves the edit rows, in eager mode and compiled."""
    torch.compiler.reset()

    def lock(x: torch.Tensor, index: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        kvlock_kernels.kv_lerp_(x[1:], x[:1, 2:4], index, ratio)
        return x * 1

    index, ratio = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0.25, 1.0])
    x = torch.arange(3 * 5 * 4, dtype=torch.float32).reshape(3, 5, 4)
    expected = x.clone()
    expected[1, 2:4] = 0.75 * x[1, 2:4] + 0.25 * x[0, 2:4]
    expected[2, 2:4] = x[0, 2:4]
    assert_bit_identical(lock(x.clone(), index, ratio), expected)
    assert_bit_identical(torch.compile(lock, fullgraph=True, backend="aot_eager")(x.clone(), index, ratio), expected)


def test_a_fresh_process_imports_silently_and_runs_every_operator(tmp_path: Path) -> None:
    script = """
import json, sys
import kvlock_kernels, torch
after_import = sorted(sys.modules)
ops, rows, one = torch.ops.kvlock_kernels, torch.tensor([0, 2], dtype=torch.int32), torch.ones(1)
x, source = torch.ones(1, 3, 1, 2), torch.zeros(1, 2, 1, 2)
ops.kv_lerp_(x, source, rows, one)
ops.kv_lerp_pair_(x, x.clone(), source, source, rows, one)
out, _ = ops.kv_lerp_attention(x, x, x, source, source, rows, one, scale=1.0)
variance = ops.windowed_variance_(x, torch.zeros(3, *x.shape), torch.tensor(1))
ops.lock_schedule(variance, one, tau=0.01, boost=2.0, alpha_min=0.0)
ops.guided_velocity(x, x, one, x, one)
data, scale = ops.pack_kv(x, rows, torch.int8)
ops.unpack_kv(data, scale, dtype=torch.float32)
flat, weight, angle, row = torch.ones(1, 3, 2), torch.ones(2), torch.ones(3, 2), torch.tensor([0, -1, 1]).int()
ops.qk_norm_rope_kv_lerp_(flat, flat + 1, flat + 2, weight, weight, angle, angle, source, source, row, one, eps=1e-6)
ops.qk_norm_rope_kv_pack_(flat, flat + 1, flat + 2, weight, weight, angle, angle, row, 2, torch.int8, eps=1e-6)
json.dump({"import": after_import, "run": sorted(sys.modules), "x": x.flatten().tolist()}, open(sys.argv[1], "w"))
"""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", script, str(report)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    seen = json.loads(report.read_text())
    assert seen["x"] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    for moment in ("import", "run"):
        assert not {"triton", "diffusers", "transformers", "kvlock"} & {name.split(".")[0] for name in seen[moment]}
