"""How a benchmark measures: correctness first, then CUDA events over rotating inputs, one CSV row at a time."""

import csv
import datetime
import math
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from benchmarks._case import Case, Check, Inputs, Products, Provider, Traffic, rates

SECONDS = 1.0  # of repeats for a row, within the bounds of the next line
REPEATS = (20, 200)
WARM_UP_SECONDS = 0.2
LEAD_CYCLES = 400_000  # 0.2 ms in which the host queues a call, so that the events time the GPU and not the host
COPY_BYTES = 2**30


class Row(NamedTuple):
    """One line of results; text, because what was not measured stays blank."""

    op: str
    provider: str
    shape: str
    dtype: str
    source: str
    setting: str
    status: str  # ok, failed or error
    p20: str = ""
    p50: str = ""
    p80: str = ""
    unit: str = "us"
    rate: str = ""
    rate_unit: str = ""
    work: str = ""  # bytes or FLOP
    work_formula: str = ""  # bytes an element, or FLOP
    share_of_copy: str = ""  # rate over the rate of a device copy in the same run
    predicted_us: str = ""
    max_error: str = ""  # over the largest exact value
    note: str = ""
    gpu: str = ""
    driver: str = ""
    sm_mhz: str = ""  # clocks and power right after the row
    memory_mhz: str = ""
    power_w: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


class Results:
    """A CSV file that gains rows; every row is on the disk before the next one is measured."""

    def __init__(self, path: Path, columns: tuple[str, ...] = Row._fields) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                found = next(csv.reader(file))
            if found != list(columns):
                raise ValueError(f"{path} has other columns than this version writes; move it away")
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if not path.stat().st_size:
            self._writer.writerow(columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()

    def write(self, row: tuple[str, ...]) -> None:
        self._writer.writerow(row)
        self._file.flush()


def read(path: Path) -> list[Row]:
    """The rows of a results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**line) for line in csv.DictReader(file)]


class Timing(NamedTuple):
    """Percentiles in microseconds."""

    p20: float
    p50: float
    p80: float


def gate(case: Case, provider: Provider, device: str) -> Check:
    """Runs the case once on fresh inputs and compares with the formula in fp64.

    Raises:
        RuntimeWarning: the public operator fell back to plain PyTorch, which is not what its row would say.
    """
    inputs = provider.prepare(case.make(case.shape, device, 0))
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as plain PyTorch", category=RuntimeWarning)
        check = case.check(before, provider.run(inputs))
    return check._replace(allowed=check.allowed * provider.roundings)


def measure(call: Callable[[Inputs], Any], sets: list[Inputs]) -> Timing:
    """Times one call on the GPU, over and over, each on the next of the input sets."""
    warm_up = _times(call, sets, len(sets))
    while sum(warm_up) < 1e6 * WARM_UP_SECONDS and len(warm_up) < REPEATS[1]:
        warm_up += _times(call, sets, len(sets))
    fitting = int(1e6 * SECONDS / max(min(warm_up), 1.0))
    times = torch.tensor(_times(call, sets, min(max(fitting, REPEATS[0]), REPEATS[1])))
    return Timing(*times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist())


def _times(call: Callable[[Inputs], Any], sets: list[Inputs], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        call(sets[i % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def rotation(case: Case, provider: Provider, device: str) -> list[Inputs]:
    """Three input sets or more, together more than twice the L2 cache: no call finds its inputs there."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [provider.prepare(case.make(case.shape, device, 0))]
    size = sum(value.nbytes for value in sets[0].values() if isinstance(value, torch.Tensor))
    count = min(max(3, math.ceil(2 * cache / size) + 1), 100)  # a hundred sets of a few numbers are enough
    return sets + [provider.prepare(case.make(case.shape, device, seed)) for seed in range(1, count)]


def copy_row(machine: "Machine", device: str = "cuda") -> tuple[Row, float]:
    """A large device copy, the ceiling of everything here, and its bytes a second, read and written."""
    sets = [{"to": torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)} for _ in range(2)]
    for buffers in sets:
        buffers["from"] = torch.randint_like(buffers["to"], 256)
    timing = measure(lambda buffers: buffers["to"].copy_(buffers["from"]), sets)
    rate = 2 * COPY_BYTES / timing.p50 * 1e6
    work = Traffic(COPY_BYTES, ((1, "read"), (1, "written")))
    row = Row("copy", "torch", f"{COPY_BYTES} bytes", "uint8", "", "", "ok", **_timed(timing, work, rate))
    return row._replace(work_formula=work.formula, **machine.now()), rate


def rows(cases: Iterable[Case], machine: "Machine", copy: float, device: str = "cuda") -> Iterator[Row]:
    """Measures every provider of every case; one that cannot run does not end the run."""
    for case in cases:
        for provider in case.providers:
            try:
                row = _measured(case, provider, copy, device)
            except Exception as error:
                row = _blank(case, provider, "error", note=f"{type(error).__name__}: {error}".splitlines()[0])
            torch.cuda.empty_cache()
            assumed = rates(machine.gpu)
            predicted = f"{case.work(case.shape).predicted_us(assumed):.2f}" if assumed else ""
            yield row._replace(predicted_us=predicted, **machine.now())


def _measured(case: Case, provider: Provider, copy: float, device: str) -> Row:
    if provider.compiled:
        torch.compiler.reset()
        provider = provider._replace(run=torch.compile(provider.run, fullgraph=True, dynamic=False))
    check = gate(case, provider, device)
    if not check.passed:
        note = f"not timed: error {check.error:.3g}, allowed {check.allowed:.3g}"
        return _blank(case, provider, "failed", max_error=f"{check.error:.3g}", note=note)
    timing = measure(provider.run, rotation(case, provider, device))
    row = _blank(case, provider, "ok", max_error=f"{check.error:.3g}")
    return row._replace(**_timed(timing, case.work(case.shape), copy))


def _blank(case: Case, provider: Provider, status: str, **more: str) -> Row:
    work = case.work(case.shape)
    row = Row(case.op, provider.name, case.shape.name, case.dtype, case.source, case.setting, status, **more)
    return row._replace(work=f"{work.amount:.0f}", work_formula=work.formula)


def _timed(timing: Timing, work: Traffic | Products, copy: float) -> dict[str, str]:
    columns = {name: f"{value:.2f}" for name, value in timing._asdict().items()} | {"work": f"{work.amount:.0f}"}
    if work.amount == 0:
        return columns
    rate = work.amount / timing.p50 * 1e6
    columns |= {"rate": f"{rate / work.per_unit:.5g}", "rate_unit": work.unit}
    return columns | ({"share_of_copy": f"{rate / copy:.3f}"} if isinstance(work, Traffic) else {})


class Machine:
    """What a row says of the GPU and of the software; nvidia-ml-py adds driver, clocks and power."""

    def __init__(self, commit: str | None) -> None:
        import triton

        self.gpu = torch.cuda.get_device_name(0)
        self._versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit or _commit()}
        self._nvml, self._handle = None, None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
            self._nvml = pynvml
        except Exception:  # not installed, or no such library on this machine: its columns stay blank
            pass

    def now(self) -> dict[str, str]:
        """The columns of a row written now."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"gpu": self.gpu, "date": date} | self._versions | self._state()

    def _state(self) -> dict[str, str]:
        nvml, gpu = self._nvml, self._handle
        if nvml is None:
            return {}
        try:
            return {
                "driver": nvml.nvmlSystemGetDriverVersion(),
                "sm_mhz": str(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
                "memory_mhz": str(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
                "power_w": f"{nvml.nvmlDeviceGetPowerUsage(gpu) / 1000:.0f}",
            }
        except nvml.NVMLError:
            return {}


def _commit() -> str:
    """The commit of this checkout, marked where it has changes; blank outside of one."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
