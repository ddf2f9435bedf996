"""What serves each operator, as `python -m kvlock_kernels.info` says it, and an extension that cannot be loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlock_kernels import _cuda, _extension, _ops, info


def test_the_command_names_every_operator_and_what_serves_it() -> None:
    done = subprocess.run([sys.executable, "-m", "kvlock_kernels.info"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["torch", torch.__version__]
    for name in _cuda.OPERATORS:
        assert lines[lines.index(name) + 1].split()[:2] in (["CPU", "extension"], ["CPU", "reference:"])


def test_an_extension_that_was_not_built_is_named_with_the_command_that_builds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "path", lambda: None)
    assert info.built() == "not built; build it with pip install --no-build-isolation -e ."


OLDER = _ops.CONTRACTS | {"pack_kv": "pack_kv(Tensor x, Tensor index, ScalarType dtype) -> (Tensor, Tensor)"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_extension.in_an_object(_ops.CONTRACTS), "_C"),
        (_extension.in_an_object(OLDER), "it was built for other operators than these"),
        (b"a foreign object", "it was built for other operators than these"),
    ],
    ids=["broken", "older", "foreign"],
)
def test_an_extension_that_cannot_be_loaded_warns_and_leaves_the_operators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, reason: str
) -> None:
    built = tmp_path / "_C.so"
    built.write_bytes(content)
    monkeypatch.setattr(_extension, "path", lambda: built)
    message = rf"_C\.so cannot be loaded \(.*{reason}.*\); .* serve instead; build it again: {_extension.BUILD}"
    with pytest.warns(RuntimeWarning, match=message):
        _extension.load(_ops.CONTRACTS)
    monkeypatch.setattr(_extension, "serves", lambda name, key: False)
    assert info.built().startswith(f"{built} cannot be loaded; build it again: pip install")
    assert _extension.architectures() == []


def test_on_cuda_the_extension_comes_first_and_triton_fills_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "why_not", lambda device: None)
    monkeypatch.setattr(_extension, "serves", lambda name, key: name.endswith("fallback_pack_kv"))
    monkeypatch.setattr(_extension, "architectures", lambda: ["8.0", "9.0"])
    monkeypatch.setattr(_extension, "has_code_for", lambda device: True)
    assert info.on_cuda("pack_kv", 0).startswith("extension")
    assert info.on_cuda("lock_schedule", 0).startswith("Triton")
    monkeypatch.setattr(_extension, "has_code_for", lambda device: False)
    assert info.on_cuda("pack_kv", 0).startswith("Triton")
    assert "the extension has code for 8.0, 9.0 only" in info.on_cuda("pack_kv", 0)
    monkeypatch.setattr(_cuda, "why_not", lambda device: "too old")
    assert info.on_cuda("pack_kv", 0) == "reference: too old"


def test_an_operator_that_does_not_exist_is_served_by_nothing() -> None:
    assert not _extension.serves("kvlock_kernels::no_such_operator", "CPU")


@pytest.mark.parametrize("has_code", [True, False])
def test_checks_on_a_gpu_begin_where_the_extension_has_code_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_code: bool
) -> None:
    monkeypatch.setattr(_cuda, "why_not", lambda device: None)
    monkeypatch.setattr(_extension, "serves", lambda name, key: True)
    monkeypatch.setattr(_extension, "architectures", lambda: ["9.0"])
    monkeypatch.setattr(_extension, "has_code_for", lambda device: has_code)
    python, log = tmp_path / "python", tmp_path / "log"
    report = f"    cuda:0  {info.on_cuda('pack_kv', 0)}"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != kvlock_kernels.info ] || echo "{report}"\n')
    python.chmod(0o755)
    script = Path(__file__).parents[2] / ".ci" / "gpu"
    done = subprocess.run([script, "tests"], env={"PYTHON": str(python)}, capture_output=True, text=True, check=False)
    asked, *rest = log.read_text().splitlines()
    assert asked == "-m kvlock_kernels.info"
    assert done.returncode == (not has_code) and [line.split()[:2] for line in rest] == has_code * [["-m", "pytest"]]
    assert ("the extension has no code for this GPU" in done.stderr) == (not has_code)
