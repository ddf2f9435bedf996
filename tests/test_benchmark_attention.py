"""Plain attention of the benchmarks: each backend is forced by its name, and a row says whose kernel it is."""

from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import _machine, attention, plain_attention
from benchmarks._case import TINY, Provider

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
    own = {"kvlock in loop, no rows", "one launch, no rows", "kvlock sm_90", *BACKENDS}
    said = {p.name: _machine.library(case, p) for p in case.providers if p.name not in own}
    assert said == {name: f"{library} 1.2 of {library}" for name, library in DISTRIBUTIONS.items()}
