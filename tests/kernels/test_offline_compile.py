"""The kernels compiled for GPUs that are not there: no spills, 16-byte accesses, and the table of the benchmarks."""

from pathlib import Path
from typing import Any

import pytest
from absent_gpu import printed_by

from benchmarks import offline
from benchmarks._case import Case
from kvlock_kernels import _cuda

each_case_and_arch = pytest.mark.parametrize(
    ("case", "arch"),
    [pytest.param(case, arch, id=f"{case.name}-sm_{arch}") for case in offline.OFFLINE for arch in case.archs],
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The numbers and the table."""
    return printed_by("-m", "benchmarks.offline", "--json")


@pytest.fixture
def kernels(report: dict[str, Any], case: Case, arch: int) -> list[dict[str, Any]]:
    """The kernels of one case for one architecture, in the order of their launches."""
    found = [one for one in report["kernels"] if (one["case"], one["arch"]) == (case.name, arch)]
    assert found
    return found


LAUNCHES = {
    "kv_lerp_": ["lerp_kernel"],
    "kv_lerp_pair_": ["lerp_pair_kernel"],
    "pack_kv": ["pack_kernel"],
    "unpack_kv": ["unpack_kernel"],
    "qk_norm_rope_kv_lerp_": ["norm_rope_kernel"],
    "qk_norm_rope_kv_pack_": ["norm_rope_kernel"],
    "windowed_variance_": ["ring_kernel", "mean_kernel"],
    "lock_schedule": ["schedule_kernel"],
    "guided_velocity": ["projection_kernel", "velocity_kernel"],
    "attention": ["in_loop_kernel"],
    "attention-sm_90": ["hopper_kernel"],
    "attention-in-loop": ["in_loop_kernel"],
    "attention-one-launch": ["persistent_kernel"],
}


@each_case_and_arch
def test_an_operator_launches_these_kernels_and_no_other(kernels: list[dict[str, Any]], case: Case, arch: int) -> None:
    assert [kernel["kernel"] for kernel in kernels] == LAUNCHES[case.op]


# The one launch counts the programs that have mixed a head; the kernel for sm_90 exchanges its descriptors into memory.
WITH_ATOMICS = {"attention-one-launch", "attention-sm_90"}


@each_case_and_arch
def test_sums_have_a_fixed_order_because_no_kernel_adds_up_by_atomics(
    kernels: list[dict[str, Any]], case: Case, arch: int
) -> None:
    assert (sum(kernel["atomics"] for kernel in kernels) > 0) == (case.op in WITH_ATOMICS)


SECOND = {"mean_kernel", "velocity_kernel"}  # they need the sums of the kernel before them


@each_case_and_arch
def test_a_kernel_that_starts_under_the_one_before_it_waits_for_its_end(
    kernels: list[dict[str, Any]], case: Case, arch: int
) -> None:
    for kernel in kernels:
        early = arch >= 90 and kernel["kernel"] in SECOND
        assert (kernel["starts_early"], kernel["waits"]) == (early, int(early))


# All but the sums of the kernel before them.
READ_BEFORE_THE_WAIT = {
    "mean_kernel": ["step"],
    "velocity_kernel": ["cond", "guidance_scale", "mask", "sigma", "uncond", "x"],
}


@each_case_and_arch
def test_what_the_kernel_before_writes_is_not_read_before_the_wait(
    kernels: list[dict[str, Any]], case: Case, arch: int
) -> None:
    for kernel in kernels:
        assert kernel["read_before"] == (READ_BEFORE_THE_WAIT[kernel["kernel"]] if kernel["starts_early"] else [])


@each_case_and_arch
def test_nothing_spills(kernels: list[dict[str, Any]], case: Case, arch: int) -> None:
    assert sum(kernel["spills"] for kernel in kernels) == 0


OTHER_CASES = str(Path(__file__).with_name("other_cases.py"))


@pytest.fixture(scope="module")
def beside_the_table() -> list[dict[str, Any]]:
    """The kernels for x of fp32, for e4m3 rows under the largest tile and for heads of 64, 96 and 256."""
    return printed_by(OTHER_CASES)


def test_nothing_spills_beside_the_table(beside_the_table: list[dict[str, Any]]) -> None:
    assert {kernel["case"].split()[1] for kernel in beside_the_table} == {"fp32", "bf16"}
    assert {kernel["case"].split()[2] for kernel in beside_the_table} == {"D64", "D96", "D128", "D256"}
    assert [kernel for kernel in beside_the_table if kernel["spills"]] == []


def test_shared_memory_is_within_the_limit_beside_the_table(beside_the_table: list[dict[str, Any]]) -> None:
    assert [one for one in beside_the_table if one["shared"] > offline.SHARED_LIMIT[one["arch"]]] == []


@pytest.mark.slow
def test_nothing_spills_at_other_head_dimensions() -> None:
    assert [kernel for kernel in printed_by(OTHER_CASES, "dims") if kernel["spills"]] == []


# How often a thread loads and stores 16 bytes of rows and weights, with source rows in 16 and in 8 bits. Rows in 8 bits
# come 16 elements at a time, with two loads of as many elements in 16 bits, and four of the fp32 mean of keys.
ACCESSES = {
    "kv_lerp_": ((2, 1), (1 + 2 + 4, 2)),
    "kv_lerp_pair_": ((4, 2), (1 + 2 + 4 + 1 + 2, 4)),
    "pack_kv": ((1, 1), (1, 1)),
    "unpack_kv": ((1, 1), (1 + 4, 2)),
    "qk_norm_rope_kv_lerp_": ((7, 3), (5, 3)),
    "qk_norm_rope_kv_pack_": ((5, 4), (5, 2)),
}


@each_case_and_arch
def test_loads_and_stores_of_rows_are_16_bytes_wide(kernels: list[dict[str, Any]], case: Case) -> None:
    """In the norm pass 8-bit rows take 8 bytes, beside 8 elements of 16; angles and scales are a few numbers."""
    if not case.wide:
        pytest.skip("its threads move a few numbers")
    loads, stores = ACCESSES.get(case.op, ((1, 1),) * 2)[case.source in ("int8", "e4m3")]
    assert sum(kernel["loads_128"] for kernel in kernels) >= loads
    assert sum(kernel["stores_128"] for kernel in kernels) >= stores


@each_case_and_arch
def test_shared_memory_is_within_the_limit_of_the_card(kernels: list[dict[str, Any]], arch: int) -> None:
    assert all(kernel["shared"] <= offline.SHARED_LIMIT[arch] for kernel in kernels)


REGISTERS = 65536  # of a multiprocessor
THREADS = 512  # of a program of the norm pass at its largest token
SUMS = 256  # bytes of shared memory that its sums take at most; rows of 8192 elements would take 16384


LARGEST = [case for case in offline.OFFLINE if "norm_rope" in case.op and case.shape.heads == 40]


@pytest.mark.parametrize(("case", "arch"), [(case, arch) for case in LARGEST for arch in case.archs])
def test_two_tokens_of_forty_heads_fit_a_multiprocessor(kernels: list[dict[str, Any]], case: Case, arch: int) -> None:
    """The norm pass has a token in a program; with one at a time nothing is loaded while another one is reduced."""
    (kernel,) = kernels
    assert 2 * kernel["registers"] * THREADS <= REGISTERS


@pytest.mark.parametrize(("case", "arch"), [(case, arch) for case in LARGEST for arch in case.archs])
def test_rows_of_forty_heads_come_in_the_layout_of_their_tokens(
    kernels: list[dict[str, Any]], case: Case, arch: int
) -> None:
    """Shared memory has sums and no rows on their way from one layout to another."""
    (kernel,) = kernels
    assert kernel["shared"] <= SUMS


@each_case_and_arch
def test_no_product_and_sum_are_fused_where_the_bits_are_those_of_the_reference(
    kernels: list[dict[str, Any]], case: Case, arch: int
) -> None:
    """The interpreter does not fuse, so that it cannot see what this would change."""
    if case.op.startswith(("kv_lerp", "pack_kv", "unpack_kv", "qk_norm", "attention-in-loop")):
        assert sum(kernel["fused"] for kernel in kernels) == 0


def test_every_operator_with_a_kernel_is_compiled() -> None:
    attention = {"kv_lerp_attention", "kv_lerp_attention_"}  # they launch the lerp of pairs, then one of these
    launched = {*_cuda.OPERATORS} - attention | {"attention-in-loop", "attention-sm_90"}
    assert {case.op for case in offline.OFFLINE} >= launched


PRODUCTS = {80: "HMMA", 89: "HMMA", 90: "HGMMA"}


@pytest.mark.parametrize(
    ("case", "arch"), [(case, arch) for case in offline.OFFLINE if "attention" in case.op for arch in case.archs]
)
def test_attention_multiplies_on_the_tensor_cores(kernels: list[dict[str, Any]], case: Case, arch: int) -> None:
    (kernel,) = kernels
    assert kernel["products"] == PRODUCTS[arch]


def test_the_table_in_the_readme_is_what_the_command_prints(report: dict[str, Any]) -> None:
    stated, printed = offline.section(offline.PAGE.read_text(encoding="utf-8")), report["table"]
    version = lambda table: table.split(";")[0]
    if version(stated) != version(printed):
        pytest.skip(f"the table was made with {version(stated)}, this is {version(printed)}")
    assert stated == printed


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        offline.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
