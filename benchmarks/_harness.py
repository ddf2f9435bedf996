"""How a benchmark measures: correctness first, then CUDA events over rotating inputs, one CSV row at a time."""

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from benchmarks._case import RATES, Case, Check, Inputs, NotInstalled, Products, Provider, Rates, Traffic, normal
from benchmarks._machine import Machine, libraries
from benchmarks._model import predict

SECONDS = 0.5  # of repeats for a row, within the bounds of the next line
REPEATS = (20, 200)
WARM_UP_SECONDS = 0.2
# That the GPU sleeps while the host queues a call, so that events time the GPU: 0.2 ms, up to 13 for a slow host.
LEAD_CYCLES = (400_000, 25_600_000)
LATE = "host's times"  # how the note of a row begins most of whose calls were queued late
STEADY = 1.25  # times its p20 that the p80 of a row may be; beyond it the host or another program was in its way
COPY_BYTES = 2**30
MATMUL_SIDE = 8192


Key = tuple[str, str, str, str, str]  # operator, provider, shape, source and setting


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
    share_of_matmul: str = ""  # rate over the rate of a large product of bf16 matrices in the same run
    over_plain: str = ""  # time over that of plain attention by the same kernels in the same run
    predicted_us: str = ""
    max_error: str = ""  # over the largest exact value
    relative_error: str = ""  # norm of the error over that of the exact values
    note: str = ""
    gpu: str = ""
    driver: str = ""
    sm_mhz: str = ""  # clocks and power right after the row
    memory_mhz: str = ""
    power_w: str = ""
    used_mib: str = ""  # device memory with the inputs of the row still in it
    library: str = ""  # names and versions of whose kernels they are
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


def key(row: Row) -> Key:
    """What tells a row from the others of a run."""
    return row.op, row.provider, row.shape, row.source, row.setting


def is_steady(row: Row) -> bool:
    """Whether its times are the GPU's and lie near each other."""
    return not row.p20 or (not row.note.startswith(LATE) and float(row.p80) <= STEADY * float(row.p20))


def not_failed_since(rows: Iterable[Row]) -> list[Row]:
    """The timed rows of a file, in its order, but for those whose kind has failed, or could not be measured, later."""
    found: list[Row] = []
    for row in rows:
        if row.status != "ok":
            found = [before for before in found if key(before) != key(row)]
        else:
            found.append(row)
    return found


class Timing(NamedTuple):
    """Percentiles in microseconds."""

    p20: float
    p50: float
    p80: float
    late: float = 0.0  # the share of calls that the host was late to queue, so that these are the host's times


def ready(provider: Provider) -> Provider:
    """The provider, compiled where it wants to be.

    What was compiled before is forgotten, whoever did it: torch compiles one function for eight shapes and no more.
    """
    torch.compiler.reset()
    if not provider.compiled:
        return provider
    return provider._replace(run=torch.compile(provider.run, fullgraph=True, dynamic=False))


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
    """Times one call on the GPU, over and over, each on the next of the input sets.

    A call that the GPU came to before the host had queued it is left out, and the next ones get more time; where most
    are late all are kept.
    """
    warm_up, _ = _times(call, sets, len(sets))
    while sum(warm_up) < 1e6 * WARM_UP_SECONDS and len(warm_up) < REPEATS[1]:
        warm_up += _times(call, sets, len(sets))[0]
    fitting = int(1e6 * SECONDS / max(min(warm_up), 1.0))
    times, late = _times(call, sets, min(max(fitting, REPEATS[0]), REPEATS[1]))
    on_time = [time for time, was_late in zip(times, late, strict=True) if not was_late]
    enough = 2 * len(on_time) >= len(times)
    p20, p50, p80 = torch.tensor(on_time if enough else times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(p20, p50, p80, 0.0 if enough else sum(late) / len(late))


def _times(call: Callable[[Inputs], Any], sets: list[Inputs], repeats: int) -> tuple[list[float], list[bool]]:
    """Microseconds of each call, and whether the host was late to queue it."""
    events, late, (lead, most) = [], [], LEAD_CYCLES
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(lead)
        start.record()
        call(sets[i % len(sets)])
        end.record()
        events.append((start, end))
        late.append(start.query())
        lead = min(2 * lead, most) if late[-1] else lead
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events], late


def rotation(case: Case, provider: Provider, device: str) -> list[Inputs]:
    """Three input sets or more; calls read and write twice the L2 cache of them, so that none finds its inputs."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [provider.prepare(case.make(case.shape, device, 0))]
    size = sum(value.nbytes for value in sets[0].values() if isinstance(value, torch.Tensor))
    work = case.work(case.shape)
    if isinstance(work, Traffic) and work.amount:
        size = min(size, math.ceil(work.amount))  # a call may touch a part of what it is given
    count = min(max(3, math.ceil(2 * cache / size) + 1), 100)  # a hundred sets of a few numbers are enough
    return sets + [provider.prepare(case.make(case.shape, device, seed)) for seed in range(1, count)]


class Ceilings(NamedTuple):
    """What the GPU reaches in this run."""

    copy: float  # bytes a second, read and written
    matmul: float = math.nan  # FLOP a second


def copy_row(machine: Machine, device: str = "cuda") -> tuple[Row, float]:
    """A large device copy, the ceiling of what moves bytes, and its bytes a second, read and written."""
    sets = [{"to": torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)} for _ in range(2)]
    for buffers in sets:
        buffers["from"] = torch.randint_like(buffers["to"], 256)
    timing = measure(lambda buffers: buffers["to"].copy_(buffers["from"]), sets)
    memory = _given_back(machine, sets)
    rate = 2 * COPY_BYTES / timing.p50 * 1e6
    work = Traffic(COPY_BYTES, ((1, "read"), (1, "written")))
    row = Row("copy", "torch", f"{COPY_BYTES} bytes", "uint8", "", "", "ok", **_timed(timing, work, Ceilings(rate)))
    return row._replace(work_formula=work.formula, **memory, **machine.now()), rate


def matmul_row(machine: Machine, device: str = "cuda") -> tuple[Row, float]:
    """A large product of bf16 matrices, the ceiling of what multiplies, and its FLOP a second."""
    n = MATMUL_SIDE
    sets = [{f"{i}": normal(n, n, device=device, seed=2 * seed + i) for i in range(2)} for seed in range(3)]
    timing = measure(lambda matrices: matrices["0"] @ matrices["1"], sets)
    memory = _given_back(machine, sets)
    work = Products(2.0 * n**3, "2 N^3")
    rate = work.amount / timing.p50 * 1e6
    columns = _timed(timing, work, Ceilings(math.nan, rate))
    row = Row("matmul", "torch", f"{n} x {n} x {n}", "bf16", "", "", "ok", **columns)
    return row._replace(work_formula=work.formula, **memory, **machine.now()), rate


def _given_back(machine: Machine, sets: list[Inputs]) -> dict[str, str]:
    """The column of device memory with these inputs; then they are gone, also from the allocator's cache."""
    memory = machine.memory()
    sets.clear()
    torch.cuda.empty_cache()
    return memory


def rows(cases: Iterable[Case], machine: Machine, ceilings: Ceilings, device: str = "cuda") -> Iterator[Row]:
    """Predicts every row, then measures it; a provider that cannot run does not end the run.

    One whose library is not installed has no row.
    """
    assumed = RATES.get(machine.gpu, Rates(ceilings.copy, ceilings.matmul))
    planned = [(case, provider) for case in cases for provider in case.providers]
    predicted = [f"{predict(case, provider.name, assumed).us:.2f}" for case, provider in planned]
    plain: dict[tuple[str, str], float] = {}  # times of plain attention, by shape and provider
    for (case, provider), prediction in zip(planned, predicted, strict=True):
        try:
            row = _measured(case, provider, ceilings, device)
        except NotInstalled:
            continue
        except Exception as error:
            row = _blank(case, provider, "error", note=f"{type(error).__name__}: {error}".splitlines()[0])
        memory = machine.memory()
        torch.cuda.empty_cache()
        if row.p50 and case.op == "attention":
            plain[row.shape, row.provider] = float(row.p50)
        if row.p50 and (row.shape, provider.over) in plain:
            row = row._replace(over_plain=f"{float(row.p50) / plain[row.shape, provider.over]:.4f}")
        yield row._replace(predicted_us=prediction, **memory, **machine.now())


def _measured(case: Case, provider: Provider, ceilings: Ceilings, device: str) -> Row:
    provider = ready(provider)
    check = gate(case, provider, device)
    errors = {"max_error": f"{check.error:.3g}", "relative_error": f"{check.relative:.3g}"}
    if not check.passed:
        note = f"not timed: error {check.error:.3g}, allowed {check.allowed:.3g}"
        return _blank(case, provider, "failed", note=note, **errors)
    timing = measure(provider.run, rotation(case, provider, device))
    note = f"{LATE}: it was late to queue {timing.late:.0%} of the calls" if timing.late else ""
    row = _blank(case, provider, "ok", note=note, **errors)
    return row._replace(**_timed(timing, case.work(case.shape), ceilings))


def _blank(case: Case, provider: Provider, status: str, **more: str) -> Row:
    work = case.work(case.shape)
    row = Row(case.op, provider.name, case.shape.name, case.dtype, case.source, case.setting, status, **more)
    return row._replace(work=f"{work.amount:.0f}", work_formula=work.formula, library=libraries(case, provider))


def _timed(timing: Timing, work: Traffic | Products, ceilings: Ceilings) -> dict[str, str]:
    columns = {name: f"{getattr(timing, name):.2f}" for name in ("p20", "p50", "p80")} | {"work": f"{work.amount:.0f}"}
    if work.amount == 0:
        return columns
    rate = work.amount / timing.p50 * 1e6
    columns |= {"rate": f"{rate / work.per_unit:.5g}", "rate_unit": work.unit}
    if isinstance(work, Traffic):
        return columns | {"share_of_copy": f"{rate / ceilings.copy:.3f}"}
    return columns | ({} if math.isnan(ceilings.matmul) else {"share_of_matmul": f"{rate / ceilings.matmul:.3f}"})
