"""Plain attention of the benchmarks: each backend is forced by its name, and a row says whose kernel it is."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import __main__ as runner
from benchmarks import _harness, _machine, attention, lerp, plain_attention
from benchmarks._case import TINY, Provider, Shape
from kvlock_kernels._triton import attend, hopper, plain

ENABLED = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA FLASH": SDPBackend.FLASH_ATTENTION,
    "SDPA EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
}
DISTRIBUTIONS = {
    "FlexAttention": "torch",
    "SageAttention": "sageattention",
    "flash-attn 2": "flash-attn",
    "flash-attn 3": "flash-attn-3",
    "flash-attn 4": "flash-attn-4",
}
LOCKED = attention.case(TINY, torch.bfloat16)
FIRST = [provider for provider in LOCKED.providers if provider.name.endswith("+ cuDNN")]
FORCED = [provider for provider in plain_attention.PLAIN if provider.name in BACKENDS]


@pytest.mark.parametrize("provider", [*FORCED, *FIRST], ids=lambda provider: provider.name.replace(" ", "-"))
def test_attention_runs_by_the_backend_of_its_name_or_not_at_all(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[SDPBackend]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        found.append([backend for backend, enabled in ENABLED.items() if enabled()])
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    provider.run(provider.prepare(LOCKED.make(TINY, "cpu", 0)))
    assert found == [[BACKENDS.get(provider.name, SDPBackend.CUDNN_ATTENTION)]]


def test_every_backend_has_its_name_and_a_provider() -> None:
    assert plain_attention.BACKENDS == BACKENDS
    assert [provider.name for provider in FORCED] == [*BACKENDS] and len(FIRST) == 3


def test_a_kernel_of_another_library_has_the_version_of_its_distribution_in_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2 of {name}")
    case = attention.plain_case(TINY)
    said = {p.name: _machine.libraries(case, p) for p in case.providers if p.name not in BACKENDS}
    names = DISTRIBUTIONS | dict.fromkeys(("kvlock in loop, no rows", "one launch, no rows", "kvlock sm_90"), "triton")
    assert said == {name: f"{library} 1.2 of {library}" for name, library in names.items()}


def test_a_locked_row_says_by_whom_rows_are_mixed_and_who_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_machine.info, "on_cuda", lambda op, device: "Triton: and more")
    monkeypatch.setattr(attention, "attends", partial(attention.attends, device="cpu"))
    monkeypatch.setattr(attention._cuda, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(plain, "compiled_hopper", lambda *call: hopper)
    said = {p.name: _machine.libraries(LOCKED, p) for p in attention.here(LOCKED).providers}
    assert said == {
        "kvlock": "Triton + cudnn 9", "in loop": "triton 1.2", "one launch": "triton 1.2",
        "kv_lerp_pair_ + cuDNN": "Triton + cudnn 9", "torch.compile + cuDNN": "torch 1.2 + cudnn 9",
        "torch.lerp + cuDNN": "torch 1.2 + cudnn 9",
    }  # fmt: skip
    long = attention.case(attention.WAN_1_3B_480P, torch.bfloat16)

    def own() -> tuple[str, str]:
        provider = attention.here(long).providers[0]
        return _machine.libraries(long, provider), provider.over

    assert own() == ("Triton", "kvlock sm_90")  # which attends too
    monkeypatch.setattr(plain, "compiled_hopper", lambda *call: None)
    assert own() == ("Triton + cudnn 9", "SDPA cuDNN")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert own() == ("Triton + torch 1.2", "SDPA FLASH")  # FLASH is torch's
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert own() == ("Triton + cudnn 9", "SDPA cuDNN")
    assert attention.here(long).providers[1:] == long.providers[1:]
    monkeypatch.setattr(plain, "flash_attention", lambda name: print)
    monkeypatch.setattr(attention, "flash_attention", lambda name: print)
    monkeypatch.setattr(attend, "TABLE", (attend.TABLE[-1]._replace(plain=("flash-attn 3", *attend.TORCH)),))
    assert own() == ("Triton + flash-attn-3 1.2", "flash-attn 3")
    monkeypatch.setattr(attention, "flash_attention", lambda name: None)
    assert own() == ("Triton + cudnn 9", "SDPA cuDNN")
    monkeypatch.setattr(attend, "TABLE", (attend.TABLE[-1]._replace(plain=attend.REST[1:]),))
    assert attention.here(long) is long  # no provider is torch's plain formula
    monkeypatch.setattr(attention._cuda, "why_not", lambda device: "too old")
    monkeypatch.setattr(attend, "TABLE", ())
    assert attention.here(long) is long
    for other in (attention.plain_case(TINY), lerp.case(TINY, 0.8, torch.bfloat16, 0.3)):
        assert attention.here(other) is other


def test_every_row_of_the_runner_says_whose_kernel_it_is() -> None:
    assert {p.name for case in runner.CASES for p in case.providers if not p.libraries} == set()


def test_the_compiled_formula_runs_at_more_shapes_than_torch_compiles_of_one_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for tokens in range(2, 12):
        shape = Shape("tiny", (1, 1, 10 * tokens), 1, 16)
        case = attention.case(shape, torch.bfloat16)
        provider = _harness.ready(attention.by_compiled_formula(SDPBackend.MATH))
        assert _harness.gate(case, provider, "cpu").passed


@pytest.mark.parametrize(
    ("name", "module"),
    [("SageAttention", "sageattention"), ("flash-attn 2", "flash_attn.flash_attn_interface"),
     ("flash-attn 3", "flash_attn_interface"), ("flash-attn 4", "flash_attn.cute")],
)  # fmt: skip
def test_a_library_that_is_not_installed_has_no_row_and_one_that_is_broken_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str
) -> None:
    package, _, inside = module.partition(".")
    case = attention.plain_case(TINY)
    cases = [replace(case, providers=tuple(p for p in case.providers if p.name == name))]
    machine = SimpleNamespace(gpu="", now=dict, memory=dict)
    measured = lambda: [*_harness.rows(cases, machine, _harness.Ceilings(1.0), "cpu")]
    if importlib.util.find_spec(package) is None:
        assert measured() == []
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("import of_another_version", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    plain.flash_attention.cache_clear()
    if inside:
        assert measured() == []  # another generation of the same package is there
        (tmp_path / package / f"{inside}.py").touch()
        importlib.invalidate_caches()
    (row,) = measured()
    plain.flash_attention.cache_clear()
    assert (row.status, row.note) == ("error", "ModuleNotFoundError: No module named 'of_another_version'")
