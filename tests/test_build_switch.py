"""KVLOCK_BUILD_EXT, the switch of setup.py that says whether the extension is built."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent


def build(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds into the folder, with these environment variables beside those that are always there."""
    names = ("KVLOCK_BUILD_EXT", "TORCH_CUDA_ARCH_LIST", "CXX", "NVCC", "CUDA_HOME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    command = command or ("build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "temp"))
    words = [sys.executable, "setup.py", *command]
    return subprocess.run(words, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def tool(path: Path, says: str = "") -> str:
    """A compiler that notes its arguments in `log` beside it, writes what it is asked for and says that."""
    notes = f'echo "${{0##*/}} $@" >> {path.parent}/log'
    writes = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo object > "$2"; shift; done'
    path.write_text(f"#!/bin/sh\n{notes}\n{writes}\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def calls(folder: Path) -> list[list[str]]:
    """The words of each call of the tools in the folder."""
    return [line.split() for line in (folder / "log").read_text().splitlines()]


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, str]:
    """Tools that compile nothing, and a torch that is imported in no time."""
    helpers = tmp_path / "python" / "torch" / "utils"
    helpers.mkdir(parents=True)
    for package in (helpers.parent, helpers):
        (package / "__init__.py").touch()
    folders = "include_paths = lambda: ['/include']\nlibrary_paths = lambda: ['/library']"
    (helpers / "cpp_extension.py").write_text(folders)
    nvcc = tool(tmp_path / "nvcc", "sm_75 sm_80 sm_89 sm_90 compute_90 sm_100")
    return {"PYTHONPATH": str(helpers.parent.parent), "NVCC": nvcc, "CXX": tool(tmp_path / "g++")}


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
def test_auto_without_a_compiler_warns_and_succeeds(
    tmp_path: Path, quick: dict[str, str], chosen: dict[str, str]
) -> None:
    done = build(tmp_path, PATH="", PYTHONPATH=quick["PYTHONPATH"], **chosen)
    assert done.returncode == 0 and objects(tmp_path) == []
    assert "kvlock goes on without the extension: no C++ compiler was found" in done.stderr


def test_auto_with_a_compiler_that_fails_warns_with_what_it_said(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build(tmp_path, PATH=str(tmp_path), CXX=str(compiler))
    assert done.returncode == 0 and objects(tmp_path) == []
    assert "kvlock goes on without the extension" in done.stderr and "the disk is full" in done.stderr


def test_1_without_a_compiler_fails(tmp_path: Path, quick: dict[str, str]) -> None:
    done = build(tmp_path, PATH="", PYTHONPATH=quick["PYTHONPATH"], KVLOCK_BUILD_EXT="1")
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


@pytest.mark.parametrize("chosen", ["auto", "1"])
def test_auto_goes_on_where_torch_lacks_what_builds_extensions(
    tmp_path: Path, quick: dict[str, str], chosen: str
) -> None:
    helper = Path(quick["PYTHONPATH"]) / "torch" / "utils" / "cpp_extension.py"
    helper.write_text("raise ImportError('a part is gone')")
    done = build(tmp_path, KVLOCK_BUILD_EXT=chosen, **quick)
    assert (done.returncode == 0) == (chosen == "auto") and objects(tmp_path) == []
    assert "a part is gone" in done.stderr
    assert ("kvlock goes on without the extension: a part is gone" in done.stderr) == (chosen == "auto")


@pytest.mark.parametrize(
    ("chosen", "listed", "found"),
    [("1", "9.0;hopper", "hopper"), ("auto", "7.5 8.0", "7.5"), ("auto", "9.7+PTX", "9.7+PTX")],
)
def test_an_architecture_that_cannot_be_built_is_refused(
    tmp_path: Path, quick: dict[str, str], chosen: str, listed: str, found: str
) -> None:
    done = build(tmp_path, KVLOCK_BUILD_EXT=chosen, TORCH_CUDA_ARCH_LIST=listed, **quick)
    assert done.returncode == 1 and objects(tmp_path) == []
    assert done.stderr.splitlines()[-1] == (
        f"TORCH_CUDA_ARCH_LIST: found {found!r}, wanted numbers such as 9.0 or 9.0+PTX, of 8.0, 8.9, 9.0, 10.0"
    )


@pytest.mark.parametrize(
    ("listed", "built"),
    [(" ", ["sm_80", "sm_89", "sm_90"]), ("10.0; 9.0a+PTX", ["sm_100", "sm_90a", "compute_90a"])],
    ids=["blank", "listed"],
)
def test_the_cuda_part_is_compiled_for_the_architectures_listed(
    tmp_path: Path, quick: dict[str, str], listed: str, built: list[str]
) -> None:
    done = build(tmp_path, KVLOCK_BUILD_EXT="1", TORCH_CUDA_ARCH_LIST=listed, **quick)
    assert done.returncode == 0, done.stderr
    (compile,) = [words for words in calls(tmp_path) if "csrc/pack_kv.cu" in words]
    assert [word.rsplit("=", 1)[1] for word in compile if word.startswith("-gencode")] == built


@pytest.mark.parametrize("chosen", ["auto", "1"])
def test_without_nvcc_the_cpu_part_is_built_and_1_says_so(tmp_path: Path, quick: dict[str, str], chosen: str) -> None:
    del quick["NVCC"]
    done = build(tmp_path, KVLOCK_BUILD_EXT=chosen, PATH="", CUDA_HOME=str(tmp_path), **quick)
    assert done.returncode == 0 and (tmp_path / "kvlock_kernels" / "_C.so").exists(), done.stderr
    compiled = [words[words.index("-c") + 1] for words in calls(tmp_path) if "-c" in words]
    assert sorted(compiled) == ["csrc/binding.cpp", "csrc/pack_kv.cpp"]
    said = "no nvcc was found: only the CPU part is built; install nvcc or set NVCC or CUDA_HOME"
    assert done.stderr.splitlines().count(said) == (chosen == "1")


def test_the_compiler_may_have_a_launcher_and_compiles_for_nvcc_too(tmp_path: Path, quick: dict[str, str]) -> None:
    quick["CXX"] = f"{tool(tmp_path / 'ccache')} {quick['CXX']} -m64"
    done = build(tmp_path, KVLOCK_BUILD_EXT="1", **quick)
    assert done.returncode == 0 and (tmp_path / "kvlock_kernels" / "_C.so").exists(), done.stderr
    programs = {words[-3]: words[:3] for words in calls(tmp_path) if "-c" in words}
    launched, by_nvcc = ["ccache", str(tmp_path / "g++"), "-m64"], ["nvcc", "-ccbin", str(tmp_path / "g++")]
    assert programs == {"csrc/binding.cpp": launched, "csrc/pack_kv.cpp": launched, "csrc/pack_kv.cu": by_nvcc}
    assert "nvcc was found" not in done.stderr
    (link,) = [words for words in calls(tmp_path) if "-shared" in words]
    assert link[:3] == by_nvcc and "-L/library" in link


@pytest.mark.parametrize("compiler", ["g++", "none"])
def test_the_name_of_a_wheel_says_whether_it_holds_the_extension(
    tmp_path: Path, quick: dict[str, str], compiler: str
) -> None:
    folder = str(tmp_path)
    folders = ["egg_info", "--egg-base", folder, "build", "--build-base", folder]
    command = [*folders, "bdist_wheel", "--dist-dir", folder, "--bdist-dir", str(tmp_path / "wheel")]
    done = build(tmp_path, *command, **quick | {"CXX": str(tmp_path / compiler)})
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    holds = any(name.endswith("_C.so") for name in zipfile.ZipFile(wheel).namelist())
    assert holds == ("-cp311-abi3-" in wheel.name) == (compiler == "g++")
    assert holds != ("-py3-none-linux" in wheel.name)


def test_pip_makes_a_wheel_where_there_is_no_compiler(tmp_path: Path, quick: dict[str, str]) -> None:
    pytest.importorskip("pip")
    tree, there = tmp_path / "tree", shutil.ignore_patterns("__pycache__", "_C.so")
    for folder in ("kvlock", "kvlock_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=there)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    environment = {"PATH": "", "PYTHONPATH": quick["PYTHONPATH"], "CUDA_HOME": str(tmp_path), "HOME": str(tmp_path)}
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    words = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kvlock/mini/weights/model_index.json" in names and "kvlock_kernels/_C.so" not in names


def test_building_asks_no_registry_for_torch() -> None:
    requires = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("requires = ", 1)[1].splitlines()[0]
    assert "torch" not in requires
