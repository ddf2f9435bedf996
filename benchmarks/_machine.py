"""The GPU of a row, or the processor, and the software on it, as its columns say them."""

import contextlib
import datetime
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks._case import Case, Provider
from kvlock_kernels import info


class Machine:
    """What a row says of the device and of the software; nvidia-ml-py knows a GPU's driver, clocks and power."""

    def __init__(self, commit: str | None, device: str = "cuda") -> None:
        self._versions = {"torch": torch.__version__, "commit": commit or checkout()}
        self._nvml: Any = None
        self._handle: Any = None
        if device == "cpu":
            threads = torch.get_num_threads()
            self.name, cores = processor(), "one thread" if threads == 1 else f"{threads} threads"
            self.gpu = f"{self.name}, {cores}"
            return
        import triton

        self.name = self.gpu = torch.cuda.get_device_name(0)
        self._versions["triton"] = triton.__version__
        self._nvml, self._handle = start_nvml()

    @property
    def file(self) -> str:
        """The name of its file of results."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name.lower())) + ".csv"

    def memory(self) -> dict[str, str]:
        """The column of device memory: what all processes use now, the cache of torch's allocator included."""
        if self._nvml is None:
            return {}
        try:
            return {"used_mib": f"{self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20:.0f}"}
        except self._nvml.NVMLError:
            return {}

    def now(self) -> dict[str, str]:
        """The columns of a row written now."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"gpu": self.gpu, "date": date} | self._versions | self._state()

    def _state(self) -> dict[str, str]:
        nvml, gpu = self._nvml, self._handle
        if nvml is None:
            return {}
        columns = {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "sm_mhz": lambda: str(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "memory_mhz": lambda: str(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            "power_w": lambda: f"{nvml.nvmlDeviceGetPowerUsage(gpu) / 1000:.0f}",
        }
        state = {}
        for name, ask in columns.items():
            with contextlib.suppress(nvml.NVMLError):  # not every GPU knows each of them
                state[name] = ask()
        return state


def lacking() -> str:
    """What rows of a GPU want that this machine does not have; blank where it has everything."""
    if not torch.cuda.is_available():
        return "a CUDA GPU, and torch sees none"
    try:
        start_nvml()
    except ImportError:
        return 'nvidia-ml-py, for the clocks, the power and the memory of each row: pip install -e ".[bench]"'
    except Exception as error:
        return f"NVML, for the clocks, the power and the memory of each row: {error}"
    return ""


def start_nvml() -> tuple[Any, Any]:
    """The module and its handle of the first GPU of torch's."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def checkout() -> str:
    """The commit of this checkout, marked where it has changes but rows more; blank outside of one."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(exclude)results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """The processor's name for itself, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def libraries(case: Case, provider: Provider) -> str:
    """Names and versions of the libraries that compute.

    A provider's name is that of a distribution, "cudnn", or "kvlock" for what serves the operator of this package.
    """
    return " + ".join(filter(None, (_named(case, name) for name in provider.libraries)))


def _named(case: Case, name: str) -> str:
    """One of them; blank where its version is not known."""
    if name == "kvlock":
        return (info.on_cuda(case.op, 0) if torch.cuda.is_available() else info.on_cpu(case.op)).split(":")[0]
    if name == "cudnn":
        version = torch.backends.cudnn.version()
        return f"{name} {version}" if version else ""
    try:
        return f"{name} {metadata.version(name)}" if name else ""
    except metadata.PackageNotFoundError:
        return ""
