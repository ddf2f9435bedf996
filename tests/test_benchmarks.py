"""The benchmarks on a CPU: every case passes its own check at a tiny shape, and what is written can be read."""

import dataclasses
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from benchmarks import __main__ as runner
from benchmarks import _case, _harness, _machine, _model, attention, plain_attention
from benchmarks._case import RATES, SHAPES, TINY, Case, Provider, Rates, Shape, Traffic
from benchmarks._harness import Ceilings, Results, Row
from kvlock_kernels import reference
from kvlock_kernels._triton import attend, plain

LERP = "kv_lerp_-int8-share-0.8,-ratio-0.3"
CEILINGS = Ceilings(1.0)
TINY_CASES = {
    f"{case.op}-{case.source or case.dtype}-{case.setting}".replace(" ", "-"): dataclasses.replace(case, shape=TINY)
    for case in runner.CASES
}
EVERYBODY = [
    pytest.param(case, provider, id=f"{name}-{provider.name}".replace(" ", "-"))
    for name, case in TINY_CASES.items()
    for provider in case.providers
    if not provider.compiled and not provider.needs_gpu  # the former is "eager" once more
]


class NoMachine:
    """Says nothing of GPU and versions."""

    gpu = "NVIDIA H200"

    def now(self) -> dict[str, str]:
        return {}

    def memory(self) -> dict[str, str]:
        return {}


@pytest.mark.smoke
@pytest.mark.parametrize(("case", "provider"), EVERYBODY)
def test_a_provider_passes_the_check(case: Case, provider: Provider) -> None:
    check = _harness.gate(case, provider, "cpu")
    assert check.passed, check


def bytes_of(op: str, setting: str, source: str = "bf16") -> float:
    """An element of this case at the tiny shape: 3 heads of 16."""
    return TINY_CASES[f"{op}-{source}-{setting}".replace(" ", "-")].work(TINY).per_element


def test_at_the_ends_only_what_is_needed_moves() -> None:
    share = _case.background_rows(TINY, 0.8) / TINY.tokens
    for op in ("kv_lerp_", "kv_lerp_pair_"):
        assert [bytes_of(op, f"share 0.8, ratio {ratio}") for ratio in ("0", "0.3", "1")] == [0, 6, 4]
    op, alone = "qk_norm_rope_kv_lerp_", 4 + 8 / 3 + 4  # queries and keys, angles for 3 heads, and written
    assert bytes_of(op, "without the lock") == pytest.approx(alone)
    assert bytes_of(op, "share 0.8, ratio 0") == pytest.approx(alone)
    assert bytes_of(op, "share 0.8, ratio 0.3") == pytest.approx(alone + share * (4 + 4))
    # Keys and values of locked tokens are not read: 2 bytes of each, of which those of keys are among `alone`.
    assert bytes_of(op, "share 0.8, ratio 1") == pytest.approx(alone - 2 * share + share * (2 + 4))
    packed = 2 * (1 + 4 / 16)  # codes, and a scale for each head
    assert bytes_of(op, "share 0.8, ratio 1", "int8") == pytest.approx(alone - 2 * share + share * (2 + packed))


def spoiled(case: Case) -> Provider:
    """The eager formula with one element of its first result off by an eighth of the largest value."""
    provider = next(provider for provider in case.providers if provider.name == "eager")

    def run(inputs):
        first, *rest = provider.run(inputs)
        values = first.float()
        values.view(-1)[0] += max(values.abs().max() / 8, 1)
        return values.to(first.dtype), *rest

    return Provider("spoiled", run)


@pytest.mark.parametrize("name", [n for n, c in TINY_CASES.items() if any(p.name == "eager" for p in c.providers)])
def test_a_wrong_result_is_written_as_failed_and_not_timed(name: str) -> None:
    case = dataclasses.replace(TINY_CASES[name], providers=(spoiled(TINY_CASES[name]),))
    (row,) = _harness.rows([case], NoMachine(), CEILINGS, "cpu")
    assert (row.status, row.p50, row.rate) == ("failed", "", "")


def test_a_provider_that_cannot_run_does_not_end_the_run() -> None:
    case = TINY_CASES["pack_kv-int8-share-0.8"]

    def run(inputs):
        raise RuntimeError("no\nway")

    case = dataclasses.replace(case, providers=(Provider("broken", run), spoiled(case)))
    broken, failed = _harness.rows([case], NoMachine(), CEILINGS, "cpu")
    assert (broken.status, broken.note, broken.p50) == ("error", "RuntimeError: no", "")
    assert failed.status == "failed"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events on the clock of the host, so that the path of a timed row runs; its times mean nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def query(self) -> bool:
            return False

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**19))
    monkeypatch.setattr(_harness, "SECONDS", 0.01)
    monkeypatch.setattr(_harness, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(_harness, "COPY_BYTES", 2**12)
    monkeypatch.setattr(_harness, "MATMUL_SIDE", 64)


@pytest.mark.smoke
@pytest.mark.usefixtures("clock")
def test_a_row_that_passes_has_a_time_and_the_rate_that_follows_from_it() -> None:
    case = TINY_CASES[LERP].by("kvlock")
    case = dataclasses.replace(case, providers=(*case.providers, *TINY_CASES[LERP].by("eager").providers))
    copy, ceiling = _harness.copy_row(NoMachine(), "cpu")
    assert copy.status == "ok" and float(copy.share_of_copy) == 1.0
    for row in _harness.rows([case], NoMachine(), Ceilings(ceiling), "cpu"):
        assert row.status == "ok" and float(row.relative_error) > 0
        assert float(row.p20) <= float(row.p50) <= float(row.p80)
        predicted = _model.predict(case, row.provider, RATES["NVIDIA H200"]).us
        assert float(row.predicted_us) == pytest.approx(predicted, abs=5e-3)
        rate = float(row.work) / float(row.p50) / 1e3
        assert float(row.rate) == pytest.approx(rate, rel=0.01)
        assert float(row.share_of_copy) == pytest.approx(rate * 1e9 / ceiling, rel=0.01, abs=1e-3)  # three digits


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("ceiling", [_harness.copy_row, _harness.matmul_row])
def test_the_memory_of_a_ceiling_is_given_back(ceiling, monkeypatch: pytest.MonkeyPatch) -> None:
    given, measure, emptied = [], _harness.measure, []
    monkeypatch.setattr(_harness, "measure", lambda call, sets: given.append(sets) or measure(call, sets))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(given[0])))
    ceiling(NoMachine(), "cpu")
    assert emptied == [0]


@pytest.mark.smoke
@pytest.mark.usefixtures("clock")
def test_a_row_of_attention_is_set_against_the_matmul_and_against_plain_attention_of_the_same_run() -> None:
    plain, locked = TINY_CASES["attention-bf16-no-rows"], TINY_CASES["kv_lerp_attention_-int8-share-0.8,-ratio-0.3"]
    yardstick = Provider("SDPA cuDNN", plain_attention.forced(SDPBackend.MATH))
    plain = dataclasses.replace(plain, providers=(yardstick,))
    ours = attention.by_operator(SDPBackend.MATH), locked.providers[1]._replace(run=locked.providers[0].run)
    locked = dataclasses.replace(locked, providers=ours)
    matmul, ceiling = _harness.matmul_row(NoMachine(), "cpu")
    assert matmul.status == "ok" and float(matmul.share_of_matmul) == 1.0
    rows = [*_harness.rows([plain, locked], NoMachine(), Ceilings(1.0, ceiling), "cpu")]
    assert [row.status for row in rows] == ["ok", "ok", "ok"]
    assert [bool(row.over_plain) for row in rows] == [False, True, False]  # "in loop" has a yardstick of its own
    assert float(rows[1].over_plain) == pytest.approx(float(rows[1].p50) / float(rows[0].p50), rel=0.01)
    for row in rows:
        rate = float(row.work) / float(row.p50) * 1e6
        assert float(row.share_of_matmul) == pytest.approx(rate / ceiling, rel=0.01, abs=1e-3)
        assert row.share_of_copy == ""


@pytest.mark.parametrize("name", ["pack_kv-int8-share-0.8", "unpack_kv-int8-share-0.8", LERP])
def test_the_extension_is_asked_for_before_it_is_timed_and_then_called_directly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, asked = TINY_CASES[name], []
    (provider,) = case.by("C++").providers
    monkeypatch.setattr(_case.info, "on_cuda", lambda op, device: asked.append(op) or served)
    served = "Triton: a kernel serves"
    with pytest.raises(RuntimeError, match="not served by the extension: Triton"):
        _harness.gate(case, provider, "cpu")
    served = "extension: it has code for this GPU"
    assert _harness.gate(case, provider, "cpu").passed and asked == [case.op] * 2
    inputs = provider.prepare(case.make(case.shape, "cpu", 0))
    monkeypatch.setattr(_case.kvlock_kernels, case.op, None)
    provider.run(inputs)
    assert asked == [case.op] * 3


@pytest.mark.parametrize("name", ["pack_kv-int8-share-0.8", "unpack_kv-int8-share-0.8", LERP])
def test_a_launcher_that_is_called_directly_passes_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TINY_CASES[name]
    launchers = {case.op: getattr(reference, case.op)}  # which returns as a launcher does
    monkeypatch.setattr(_case._cuda, "launchers", lambda: launchers)
    assert _harness.gate(case, case.by("Triton").providers[0], "cpu").passed


@pytest.mark.parametrize("shape", [*SHAPES, *attention.LENGTHS], ids=lambda shape: shape.name)
def test_locked_attention_is_set_against_the_kernel_that_serves_it(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnKernel(Exception):
        pass

    def own(*args, **options):
        raise OwnKernel

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(plain, "own_kernel", lambda *args: own)
    served = "SDPA cuDNN"
    try:
        with FakeTensorMode():  # which computes nothing
            q, k, v = (torch.empty(1, shape.tokens, shape.heads, shape.dim) for _ in "qkv")
            plain.plain_attention(q, k, v, 1.0, attend.choice(q, k, k).plain)
    except OwnKernel:
        served = "kvlock sm_90"
    assert attention.case(shape, torch.int8).providers[0].over == served


@pytest.mark.parametrize(
    "provider",
    [
        attention.by_operator(SDPBackend.MATH),
        attention.by_torch_lerp(attention.RATIO, SDPBackend.MATH),
        attention.by_compiled_formula(SDPBackend.MATH),
    ],
    ids=lambda provider: provider.name.replace(" ", "-"),
)
def test_mixing_first_by_anybody_passes_the_check(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # the formula once more
    check = _harness.gate(TINY_CASES["kv_lerp_attention_-bf16-share-0.8,-ratio-0.3"], provider, "cpu")
    assert check.passed and 0 < check.relative <= 1e-2, check


@pytest.mark.usefixtures("clock")
def test_input_sets_are_three_or_more_and_larger_than_twice_the_cache() -> None:
    case = TINY_CASES["windowed_variance_-fp32-10-slots"]
    sets = _harness.rotation(case, case.providers[0], "cpu")
    size = sum(value.nbytes for inputs in sets for value in inputs.values())
    assert len(sets) >= 3 and size > 2 * 2**19
    assert not torch.equal(sets[0]["x0"], sets[1]["x0"])


@pytest.mark.usefixtures("clock")
def test_inputs_that_a_call_leaves_alone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**15))
    case = next(case for name, case in TINY_CASES.items() if name.startswith("kv_lerp_-bf16-share-0.25"))
    touched = case.work(case.shape).amount
    assert len(_harness.rotation(case, case.providers[0], "cpu")) > 2 * 2**15 / touched


def test_errors_of_guidance_are_those_of_the_velocity_too() -> None:
    case = next(case for name, case in TINY_CASES.items() if name.startswith("guided_velocity"))
    check = _harness.gate(case, case.providers[0], "cpu")
    assert check.passed and check.error > 1e-4 < check.relative  # it is rounded to bf16


def test_a_row_of_another_gpu_is_predicted_by_what_that_gpu_reached() -> None:
    machine, reached = NoMachine(), _harness.Ceilings(2e12, 3e14)
    machine.gpu = "NVIDIA GeForce"
    for case in (TINY_CASES["pack_kv-int8-share-0.8"], TINY_CASES["attention-bf16-no-rows"]):
        fails = Provider("kvlock", lambda _: 1 / 0)  # a row is predicted before it is measured
        (row,) = _harness.rows([dataclasses.replace(case, providers=(fails,))], machine, reached, "cpu")
        work = case.work(case.shape)
        least = 1e6 * work.amount / (reached.copy if work.unit == "GB/s" else reached.matmul)
        assert row.status == "error" and row.predicted_us == f"{least:.2f}"


def test_no_library_is_predicted_to_multiply_faster_than_its_gpu() -> None:
    case = next(case for case in runner.CASES if case.op == "attention")
    names = ("SDPA FLASH", "SageAttention", "one launch", "in loop", "SDPA cuDNN")
    slow = {name: _model.predict(case, name, Rates(1e12, 1e14)).us for name in names}
    assert {name for name in names if slow[name] == slow["SDPA cuDNN"]} == {*names} - {"in loop"}
    assert slow["in loop"] == pytest.approx(slow["one launch"] * _model.MIXING)


def test_a_row_says_whose_kernel_it_is_and_how_full_the_memory_was() -> None:
    case = TINY_CASES["pack_kv-int8-share-0.8"]
    assert _machine.libraries(case, case.providers[0]) in ("extension", "reference", "Triton")
    assert _machine.libraries(case, Provider("x", print, libraries=("torch",))) == f"torch {metadata.version('torch')}"
    assert _machine.libraries(case, Provider("nobody", print, libraries=("no-such-library",))) == ""
    machine = object.__new__(_machine.Machine)  # without a GPU there is no other way to one
    machine._nvml, machine._handle = None, "gpu 0"
    assert machine.memory() == {}
    asked = {"gpu 0": SimpleNamespace(used=3 * 2**20)}
    machine._nvml = SimpleNamespace(nvmlDeviceGetMemoryInfo=asked.__getitem__, NVMLError=RuntimeError)
    assert machine.memory() == {"used_mib": "3"}


def test_rows_round_trip_through_the_file_and_a_second_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.csv"
    rows = [Row(*(f"{field}, {number}" for field in Row._fields)) for number in range(3)]
    written = [row._replace(note='a "note"\nof two lines') for row in rows]
    with Results(path) as results:
        results.write(written[0])
        assert _harness.read(path) == written[:1]  # on the disk before the file is closed
        results.write(written[1])
    with Results(path) as results:
        results.write(written[2])
    assert _harness.read(path) == written


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    path.write_text("op,provider\nlerp,me\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        Results(path)
    assert path.read_text(encoding="utf-8") == "op,provider\nlerp,me\n"


def test_the_bytes_of_a_lerp_are_those_of_x_source_and_result() -> None:
    case = next(case for case in runner.CASES if case.core and case.op == "kv_lerp_" and case.source == "int8")
    traffic = case.work(case.shape)
    assert traffic == Traffic(26216 * 12 * 128, ((2, "x"), (1, "source"), (4 / 128, "scale"), (2, "written")))
    assert traffic.amount == 26216 * 12 * (128 * 5 + 4)
