"""The operators on one core of a CPU, beside eager and compiled PyTorch: `pytest benchmarks`.

As on a GPU nothing is timed that fails its check. With --benchmark-disable everything runs once, at a tiny shape.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.__main__ import CASES
from benchmarks._case import TINY, WAN_1_3B_480P, Case, Products, Provider, Shape, Traffic, formula
from benchmarks._harness import Ceilings, Row, gate, ready
from benchmarks._machine import libraries
from kvlock_kernels import reference

# Time of the processor: what other programs take of a core does not count.
pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, disable_gc=True, timer=time.process_time)

SIZE = Shape("cpu", (8, 32, 32), 12)  # 25 MB of bf16 keys
ATTENTION = Shape("cpu-attention", (1, 16, 32), 12)
ALONE = Provider("SDPA", lambda inputs: (sdpa(**inputs),), libraries=("torch",))  # as the reference calls it
SETTINGS = ("share 0.8, ratio 0.3", "share 0.8", "without the lock")  # or one that has neither
SOURCES = {"qk_norm_rope_kv_lerp_": ("bf16",), "qk_norm_rope_kv_pack_": ("int8",), "kv_lerp_attention_": ("int8",)}


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def on_cpu(case: Case) -> Case:
    """The case at a size for one core, with whom it can have there."""
    providers = tuple(provider for provider in case.providers if not provider.needs_gpu)
    if case.op == "attention":
        return dataclasses.replace(case, shape=ATTENTION, providers=(*providers, ALONE))
    if case.op == "kv_lerp_attention_":
        providers = (*providers, *formula(reference.kv_lerp_attention_))
        over = tuple(provider._replace(over=ALONE.name) for provider in providers)
        return dataclasses.replace(case, shape=ATTENTION, providers=over)
    return dataclasses.replace(case, shape=SIZE, providers=providers)


def chosen(case: Case) -> bool:
    """One share and one ratio of each operator, and the sources that differ on a CPU."""
    usual = case.setting in SETTINGS or "share" not in case.setting
    return case.shape == WAN_1_3B_480P and usual and case.source in SOURCES.get(case.op, (case.source,))


ON_CPU = [on_cpu(case) for case in CASES if chosen(case)]
EVERYBODY = [
    pytest.param(case, provider, id=f"{case.name}-{case.setting}-{provider.name}".replace(" ", "-").replace(",", ""))
    for case in ON_CPU
    for provider in case.providers
]


@pytest.mark.parametrize(("case", "provider"), EVERYBODY)
def test_on_one_core(
    benchmark: Any, ceilings: Callable[[Traffic | Products], Ceilings], kept: list[Row], case: Case, provider: Provider
) -> None:
    case = dataclasses.replace(case, shape=TINY) if benchmark.disabled else case
    provider = ready(provider)
    check = gate(case, provider, "cpu")
    assert check.passed, check
    benchmark.group = f"{case.name} {case.setting}"
    reached = None if benchmark.disabled else ceilings(case.work(case.shape))
    with torch.no_grad():
        benchmark(provider.run, provider.prepare(case.make(case.shape, "cpu", 0)))
    if reached is not None:
        row = measured(case, provider, benchmark.stats.stats.sorted_data, reached, kept)
        errors = {"max_error": f"{check.error:.3g}", "relative_error": f"{check.relative:.3g}"}
        kept.append(row._replace(**errors))
        benchmark.extra_info |= {row.rate_unit or "rate": row.rate, "share of memcpy": row.share_of_copy}
        benchmark.extra_info |= {"share of matmul": row.share_of_matmul, "served by": row.library}


def measured(case: Case, provider: Provider, seconds: list[float], reached: Ceilings, others: list[Row]) -> Row:
    """The columns that a CPU has too; `others` are the rows of the run so far."""
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    work = case.work(case.shape)
    rate = work.amount / p50
    row = Row(case.op, provider.name, case.shape.name, case.dtype, case.source, case.setting, "ok")
    alone = [float(other.p50) for other in others if other[:3] == ("attention", provider.over, case.shape.name)]
    moves = isinstance(work, Traffic)
    return row._replace(
        p20=f"{1e6 * p20:.2f}", p50=f"{1e6 * p50:.2f}", p80=f"{1e6 * p80:.2f}",
        rate=f"{rate / work.per_unit:.5g}", rate_unit=work.unit, work=f"{work.amount:.0f}", work_formula=work.formula,
        share_of_copy=f"{rate / reached.copy:.3f}" if moves else "",
        share_of_matmul="" if moves else f"{rate / reached.matmul:.3f}",
        over_plain=f"{1e6 * p50 / alone[-1]:.4f}" if alone else "", library=libraries(case, provider),
    )  # fmt: skip
