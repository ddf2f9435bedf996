"""Installation of the packages kvlock and kvlock_kernels, and of the C++/CUDA extension where it can be built.

KVLOCK_BUILD_EXT says whether the extension is built: "auto" (the default) builds what the tools at hand allow, "1"
fails where one of them fails, "0" builds nothing. Building needs torch, which pip shows to a build only with
--no-build-isolation. A C++ compiler builds the CPU part, nvcc the CUDA part, for the architectures in
TORCH_CUDA_ARCH_LIST; no GPU is needed. Without nvcc the CPU part is all there is, which "1" says in a line of its own.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TRITON = 'triton>=3.6; platform_system == "Linux"'  # CUDA builds of torch bring it, CPU builds do not

SWITCH, SWITCHES = "KVLOCK_BUILD_EXT", ("auto", "0", "1")
ARCHITECTURES, OLDEST = "8.0;8.9;9.0", 8.0
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # what may stand before a compiler's name
IN_PLACE = Path(__file__).with_name("kvlock_kernels") / "_C.so"  # of an editable installation
TORCH_TARGET = "0x020a000000000000ULL"  # the stable ABI of torch 2.10, the first version that has all that is used
# A fused product and sum, or a reciprocal for a quotient, would give other bits than the reference.
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-fmad=false", "--threads=0"]


def switch() -> str:
    """The value of KVLOCK_BUILD_EXT."""
    value = os.environ.get(SWITCH, "auto")
    if value not in SWITCHES:
        raise SystemExit(f"{SWITCH}: found {value!r}, wanted {', '.join(SWITCHES[:-1])} or {SWITCHES[-1]}")
    return value


def extensions() -> list[Extension]:
    """The extension, or nothing where it is not wanted or torch is not there to build against."""
    wanted = switch()
    if wanted == "0":
        return []
    try:
        import torch  # noqa: F401 - only whether it is there
    except (ImportError, OSError) as error:  # the latter where a library of torch's is missing
        if wanted == "auto":
            return []
        raise SystemExit(
            f"{SWITCH}: found '1', but torch cannot be imported ({error}); install torch, then build with "
            "pip install --no-build-isolation"
        ) from error
    sources = [f"csrc/{name}" for name in ("binding.cpp", "pack_kv.cpp", "pack_kv.cu")]
    return [Extension("kvlock_kernels._C", sources, depends=["csrc/pack_kv.h", "csrc/eight.cuh"], py_limited_api=True)]


def architectures(nvcc: list[str]) -> list[str]:
    """The words of TORCH_CUDA_ARCH_LIST, such as "9.0" or "9.0+PTX"; each must be one that nvcc compiles these for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,")
    if not listed:
        return ARCHITECTURES.split(";")
    known = [f"{major}.{minor}" for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", run(*nvcc, "--list-gpu-code"))]
    known = [number for number in known if float(number) >= OLDEST]
    words = re.split(r"[;, ]+", listed)
    for word in words:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", word)
        if number is None or number[1] not in known:
            wanted = f"numbers such as 9.0 or 9.0+PTX, of {', '.join(known)}"
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: found {word!r}, wanted {wanted}")
    return words


def gencode(word: str) -> list[str]:
    """nvcc's flags for one architecture: its code, and PTX where that is asked for."""
    number = word.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}"] + ([f"compute_{number}"] if word.endswith("+PTX") else [])
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def compiler(variable: str, *names: str) -> list[str]:
    """The command that the environment variable holds, or the first of these names on the path, or nothing."""
    found = os.environ.get(variable, "").strip()
    return shlex.split(found) if found else list(filter(None, map(shutil.which, names)))[:1]


def host_compiler() -> list[str]:
    """nvcc's flags that have it call the compiler in CXX, where there is one; it takes a program and no launcher."""
    program = [word for word in compiler("CXX") if Path(word).name not in LAUNCHERS][:1]
    return ["-ccbin", *program] if program else []


def run(*command: str) -> str:
    """Runs a compiler and returns what it says; where it fails, that is in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


class BuildExtension(build_ext):
    """Calls the compilers itself: torch's own build class refuses to compile CUDA beside a CPU build of torch."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every version of Python, because the object holds nothing of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Both parts, or the CPU part alone; in "auto" what fails is left out with a warning."""
        # An older object must not pass for what is built now.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.editable_mode:
            IN_PLACE.unlink(missing_ok=True)
        nvcc = compiler("NVCC", "nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
        if not nvcc and switch() == "1":
            said = "no nvcc was found: only the CPU part is built; install nvcc or set NVCC or CUDA_HOME"
            print(said, file=sys.stderr)
        for cuda in (nvcc, []) if nvcc else ([],):
            try:
                self._build(ext, cuda)
                return
            except (ImportError, OSError, RuntimeError) as error:
                if switch() == "1":
                    raise
                part = "CUDA part of its extension" if cuda else "extension"
                warnings.warn(f"kvlock goes on without the {part}: {error}", stacklevel=1)
        ext.optional = True  # nothing is copied where nothing was built

    def _build(self, ext: Extension, nvcc: list[str]) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        cxx = compiler("CXX", "c++", "g++", "clang++")
        if not cxx:
            raise RuntimeError("no C++ compiler was found; install g++ or set CXX")
        target, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-I{path}" for path in include_paths())]
        commands = {".cpp": [*cxx, *CXX_FLAGS, *common]}
        if nvcc:
            words = architectures(nvcc)
            nvcc = [*nvcc, *host_compiler()]
            commands[".cpp"] += ["-DKVLOCK_CUDA", f'-DKVLOCK_ARCHITECTURES="{";".join(words)}"']
            commands[".cu"] = [*nvcc, *NVCC_FLAGS, *(flag for word in words for flag in gencode(word))]
        sources = [source for source in map(Path, ext.sources) if source.suffix in commands]
        built = [str(objects / f"{source.name}.o") for source in sources]
        with ThreadPoolExecutor() as compilers:  # each is a process of its own
            pairs = zip(sources, built, strict=True)
            calls = [(*commands[source.suffix], "-c", str(source), "-o", to) for source, to in pairs]
            list(compilers.map(lambda call: run(*call), calls))
        linker = [*nvcc, "-cudart=static"] if nvcc else cxx  # nvcc knows where its own library is
        libraries = [f"-L{path}" for path in library_paths()]
        part = target.with_suffix(".part")  # a build that is cut off leaves no half of an object
        run(*linker, "-shared", "-o", str(part), *built, *libraries, "-ltorch_cpu", "-ldl")
        part.replace(target)


class Wheel(bdist_wheel):
    """Names the extension's interface in the wheel's own name where it holds an extension."""

    def get_tag(self) -> tuple[str, str, str]:
        """That of Python alone, but for the platform, where "auto" went on without the extension."""
        python, abi, platform = super().get_tag()
        command = self.get_finalized_command("build_ext")
        built = any(Path(command.get_ext_fullpath(ext.name)).exists() for ext in command.extensions or [])
        return (python, abi, platform) if built else (self.python_tag, "none", platform)


setup(
    name="kvlock",
    version="0.1.0",
    description="KV-Lock: training-free video editing that locks the background's attention keys and values",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["kvlock", "kvlock.*", "kvlock_kernels", "kvlock_kernels.*"]),
    package_data={
        "kvlock": ["py.typed"],
        "kvlock.mini": ["weights/*", "weights/*/*"],
        "kvlock_kernels": ["py.typed"],
    },
    ext_modules=extensions(),
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=[
        "torch>=2.10",
        "diffusers>=0.38",
        "transformers",
        "accelerate",
        "ftfy",
        "safetensors",
        "imageio[ffmpeg]",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy", TRITON],
        "bench": ["nvidia-ml-py"],
        "flash": ["flash-attn"],
        "triton": [TRITON],
    },
    entry_points={"console_scripts": ["kvlock = kvlock.cli:main"]},
)
