"""Settings of all kernel tests, and the implementations of the operators they run on."""

import os
from collections.abc import Iterator

import pytest
import torch
from serving import ON_CUDA, served, triton_on_cuda

from kvlock_kernels import _extension, reference
from kvlock_kernels._cuda import OPERATORS

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode, below, asks of cuBLAS
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the first import of one

IMPLEMENTATIONS = (
    "reference",
    "interpreter",  # the Triton kernels on CPU tensors
    pytest.param("cuda", marks=pytest.mark.gpu),
)
TRITON = pytest.param("triton", marks=pytest.mark.gpu)  # where it is the extension that serves CUDA
COMPILED = [name for name in OPERATORS if _extension.serves(f"kvlock_kernels::{name}", "CPU")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a module that says EACH_IMPLEMENTATION runs on each.

    Where the extension was built its operators run on it too, and on a GPU also on the kernels that it stands before.
    Checks at the door come before any implementation, so tests of bad inputs run once.
    """
    everywhere = getattr(metafunc.module, "EACH_IMPLEMENTATION", False) and "bad" not in metafunc.fixturenames
    if everywhere:
        compiled = ("extension",) if any(hasattr(metafunc.module, name) for name in COMPILED) else ()
        behind = (TRITON,) if any(hasattr(metafunc.module, name) for name in ON_CUDA) else ()
        metafunc.parametrize("implementation", (*IMPLEMENTATIONS, *compiled, *behind), indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the operators run on: the reference, the extension, or the kernels in the interpreter or on a GPU."""
    name = getattr(request, "param", "whatever serves the CPU")
    if name == "reference":
        with served({compiled: getattr(reference, compiled) for compiled in COMPILED}):
            yield name
    elif name == "interpreter":
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled where there is a GPU; run them with -m gpu")
        import interpreter

        with interpreter.kernels_on_cpu():
            yield name
    elif name == "cuda":
        with torch.device("cuda"):
            yield name
    elif name == "triton":
        with torch.device("cuda"), triton_on_cuda():
            yield name
    else:
        yield name


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills what torch.empty returns with NaN, so that a result never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
