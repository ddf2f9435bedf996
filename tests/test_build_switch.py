"""KVLOCK_BUILD_EXT, the switch of setup.py that says whether the extension is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds into the folder, with these environment variables beside those that are always there."""
    names = ("KVLOCK_BUILD_EXT", "TORCH_CUDA_ARCH_LIST", "CXX", "NVCC")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    folders = ["--build-lib", str(folder), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def objects(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".o", ".so")]


def test_an_unknown_value_is_refused_in_one_line(tmp_path: Path) -> None:
    done = build(tmp_path, KVLOCK_BUILD_EXT="yes")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["KVLOCK_BUILD_EXT: found 'yes', wanted auto, 0 or 1"]


def test_0_builds_nothing(tmp_path: Path) -> None:
    done = build(tmp_path, KVLOCK_BUILD_EXT="0")
    assert done.returncode == 0 and objects(tmp_path) == []
    assert "kvlock goes on" not in done.stderr


@pytest.mark.parametrize("chosen", [{}, {"KVLOCK_BUILD_EXT": "auto"}], ids=["default", "auto"])
def test_auto_without_a_compiler_warns_and_succeeds(tmp_path: Path, chosen: dict[str, str]) -> None:
    done = build(tmp_path, PATH=str(tmp_path), **chosen)
    assert done.returncode == 0 and objects(tmp_path) == []
    assert "kvlock goes on without the extension: no C++ compiler was found" in done.stderr


def test_auto_with_a_compiler_that_fails_warns_with_what_it_said(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, PATH=str(tmp_path), CXX=str(compiler))
    assert done.returncode == 0 and objects(tmp_path) == []
    assert "kvlock goes on without the extension" in done.stderr and "the disk is full" in done.stderr


def test_1_without_a_compiler_fails(tmp_path: Path) -> None:
    done = build(tmp_path, PATH=str(tmp_path), KVLOCK_BUILD_EXT="1")
    assert done.returncode != 0 and objects(tmp_path) == []
    assert "no C++ compiler was found; install g++ or set CXX" in done.stderr


def test_1_without_torch_fails_with_the_command_that_shows_it_to_the_build(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is none')")
    done = build(tmp_path, PYTHONPATH=str(tmp_path), KVLOCK_BUILD_EXT="1")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "KVLOCK_BUILD_EXT: found '1', but torch cannot be imported (there is none); install torch, then build with "
        "pip install --no-build-isolation"
    ]


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    done = build(tmp_path, KVLOCK_BUILD_EXT="1", TORCH_CUDA_ARCH_LIST="9.0;hopper", NVCC=str(tool), CXX=str(tool))
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: found 'hopper', wanted numbers such as 9.0 or 9.0+PTX" in done.stderr


def test_building_asks_no_registry_for_torch() -> None:
    requires = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("requires = ", 1)[1].splitlines()[0]
    assert "torch" not in requires
