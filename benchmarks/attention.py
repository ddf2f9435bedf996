"""Attention to mixed keys and values, each way of it, beside plain attention."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import kvlock_kernels
from benchmarks import plain_attention
from benchmarks._case import (
    NAMES,
    SHAPES,
    SMALL_H12,
    WAN_1_3B_480P,
    Case,
    Check,
    Inputs,
    Outputs,
    Products,
    Provider,
    Shape,
    close,
    normal,
    ours,
)
from benchmarks.lerp import RATIO, SHARE, SHARES, exact, first_rows, make_pair, traffic
from benchmarks.plain_attention import BACKENDS, FORCED, PLAIN, SM_90, forced, launcher
from kvlock_kernels import _cuda, reference
from kvlock_kernels._triton.plain import FLASH_ATTENTION, flash_attention

OPERATOR = "kv_lerp_attention_"
SOURCES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)
SHORT = (SMALL_H12, WAN_1_3B_480P)
CORE = {(shape, torch.int8): ("kvlock", "kv_lerp_pair_ + cuDNN", "torch.compile + cuDNN") for shape in SHORT} | {
    (WAN_1_3B_480P, torch.bfloat16): ("kvlock", "torch.lerp + cuDNN")
}
OWN_FROM = {64: 32760, 128: 32760}  # tokens from which the operator takes the kernel of this package on sm_90, by D
CHECKED = 64  # queries of each head that are checked: fp64 scores of all of them do not fit a GPU


def make(
    shape: Shape, device: str, seed: int, *, source: torch.dtype, share: float = SHARE, ratio: float = RATIO
) -> Inputs:
    """Arguments of kv_lerp_attention_."""
    q = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=1000 + seed)
    mixed = make_pair(shape, device, seed, share=share, source=source, ratio=ratio)
    return {"q": q, **mixed, "scale": shape.dim**-0.5}


def make_plain(shape: Shape, device: str, seed: int) -> Inputs:
    """q, k and v, and the scale."""
    inputs = make(shape, device, seed, source=torch.bfloat16)
    return {name: inputs[name] for name in ("q", "k", "v", "scale")}


def work(shape: Shape) -> Products:
    """Two products of N queries with N keys; a multiplication and an addition each."""
    return Products(4.0 * shape.tokens**2 * shape.heads * shape.dim, "4 N^2 H D")


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the queries that are checked, in fp64."""
    queries = q[:, :: max(1, q.shape[1] // CHECKED)].double()
    out = [  # a head at a time, for the memory
        (scale * queries[:, :, h] @ k[:, :, h].double().mT).softmax(-1) @ v[:, :, h].double() for h in range(q.shape[2])
    ]
    return torch.stack(out, 2)


def check_plain(before: Inputs, after: Outputs) -> Check:
    """Two roundings: of the weights and of the result."""
    return close(queries_checked(after), (attended(*(before[name] for name in ("q", "k", "v", "scale"))),), 2)


def check(before: Inputs, after: Outputs) -> Check:
    """One more, of the mixed keys and values."""
    b, common = before, (before["index"], before["ratio"])
    k = exact(b["k"], b["k_source"], *common, b["k_scale"], b["k_mean"])
    v = exact(b["v"], b["v_source"], *common, b["v_scale"], None)
    return close(queries_checked(after), (attended(b["q"], k, v, b["scale"]),), 3)


def queries_checked(after: Outputs) -> Outputs:
    return tuple(out[:, :: max(1, out.shape[1] // CHECKED)] for out in after)


def in_loop(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.in_loop import attend_in_loop

    return attend_in_loop(**inputs)[0]


def persistent(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.persistent import attend_persistently_

    return attend_persistently_(**inputs)


def serving(shape: Shape) -> str:
    """The provider of plain attention whose kernel the operator calls on sm_90."""
    return SM_90 if shape.tokens >= OWN_FROM.get(shape.dim, math.inf) else FORCED


def attends(case: Case, device: str = "cuda") -> Provider | None:
    """The same for the GPU that is there, and for this Triton, which may not compile the kernel for sm_90.

    None where this package's kernels do not run, or what attends is none of the providers of plain attention.
    """
    if _cuda.why_not(torch.device(device)):
        return None
    from kvlock_kernels._triton import attend

    rows = torch.empty((0, case.shape.tokens, case.shape.heads, case.shape.dim), dtype=torch.bfloat16, device=device)
    source = next(dtype for dtype, name in NAMES.items() if name == case.source)
    serves = (
        kernel for kernel in attend.choice(rows, rows, rows.to(source)).plain
        if (kernel != attend.OWN or attend.own_kernel(rows, rows, 1.0) is not None)
        and (kernel not in FLASH_ATTENTION or flash_attention(kernel) is not None)
    )  # fmt: skip
    kernel = next(serves)
    names = {attend.OWN: SM_90} | {backend: name for name, backend in BACKENDS.items()}
    return next((provider for provider in PLAIN if provider.name == names.get(kernel, kernel)), None)


def here(case: Case) -> Case:
    """The case with the operator set against what attends on the GPU that is there; its row names that library too."""
    if case.op != OPERATOR or not any(p.name == "kvlock" for p in case.providers):
        return case
    plain = attends(case)
    if plain is None:
        return case
    others = () if plain.name == SM_90 else plain.libraries
    return replace(case, providers=tuple(
        p._replace(over=plain.name, libraries=("kvlock", *others)) if p.name == "kvlock" else p for p in case.providers
    ))  # fmt: skip


WAYS = (
    launcher("in loop", in_loop, "triton", over="kvlock in loop, no rows"),
    launcher("one launch", persistent, "triton", over="one launch, no rows"),
)
CUDNN = BACKENDS[FORCED]


def pair(inputs: Inputs) -> Inputs:
    """Of the arguments those of the lerp."""
    return {name: value for name, value in inputs.items() if name not in ("q", "scale")}


def mixed_first(name: str, library: str, mix: Callable[[Inputs], Any], backend: SDPBackend) -> Provider:
    """Keys and values mixed in place by somebody, then torch's attention."""
    attend = forced(backend)

    def run(inputs: Inputs) -> Outputs:
        mix(inputs)
        return attend(inputs)

    name = f"{name} + {FORCED.split()[1]}"
    return Provider(name, run, needs_gpu=True, libraries=(library, "cudnn"), over=FORCED)


def by_operator(backend: SDPBackend = CUDNN) -> Provider:
    return mixed_first("kv_lerp_pair_", "kvlock", lambda inputs: kvlock_kernels.kv_lerp_pair_(**pair(inputs)), backend)


def by_compiled_formula(backend: SDPBackend = CUDNN) -> Provider:
    """Only the formula is compiled: the backend of torch is forced outside."""

    @functools.cache
    def compiled_formula() -> Callable[..., None]:
        return torch.compile(reference.kv_lerp_pair_, fullgraph=True, dynamic=False)

    return mixed_first("torch.compile", "torch", lambda inputs: compiled_formula()(**pair(inputs)), backend)


def by_torch_lerp(ratio: float, backend: SDPBackend = CUDNN) -> Provider:
    """A contiguous slice of as many rows; torch.lerp does not know the 8-bit ones."""

    def mix(inputs: Inputs) -> None:
        for name in ("k", "v"):
            inputs[name][:, : len(inputs["index"])].lerp_(inputs[f"{name}_source"], ratio)

    return mixed_first("torch.lerp", "torch", mix, backend)._replace(prepare=first_rows)


def plain_case(shape: Shape) -> Case:
    """The yardstick."""
    return Case(
        "attention", shape, "bf16", "", "no rows", make_plain, work, check_plain, PLAIN,
        core=plain_attention.CORE if shape in SHORT else (),
        offline=shape == WAN_1_3B_480P, launch=plain_attention.without_rows,
    )


def case(shape: Shape, source: torch.dtype, share: float = SHARE, ratio: float = RATIO) -> Case:
    setting: dict[str, Any] = {"source": source, "share": share, "ratio": ratio}
    own = ours(OPERATOR)._replace(over=serving(shape), libraries=("kvlock",))
    providers = [own, *WAYS, by_operator(), by_compiled_formula()]
    if source == torch.bfloat16 and 0 < ratio < 1:  # torch.lerp does not know the ends
        providers.append(by_torch_lerp(ratio))
    short = shape in SHORT and (share, ratio) == (SHARE, RATIO)
    return Case(
        OPERATOR, shape, "bf16", NAMES[source], f"share {share:g}, ratio {ratio:g}",
        partial(make, **setting), work, check, tuple(providers), first=partial(traffic, tensors=2, **setting),
        core=CORE.get((shape, source), ()) if short else (),
    )


def compiled(name: str, launch: Callable[..., Tensor], source: torch.dtype) -> Case:
    """One way for the table of compiled kernels; it is measured as a provider of the case above."""
    return Case(
        name, WAN_1_3B_480P, "bf16", NAMES[source], "", partial(make, source=source), work, check, (),
        offline=True, launch=launch,
    )


HOPPER = Case(
    "attention-sm_90", WAN_1_3B_480P, "bf16", "", "", make_plain, work, check_plain, (),
    offline=True, launch=plain_attention.hopper, archs=(90,), wide=False,
)  # fmt: skip


TOKENS, HEADS = (4096, 8192, 16384, 32760, 75600), (12, 40)
LENGTHS = (
    *(Shape(f"n{n}-h{heads}", (1, 1, n), heads) for n in (8192, 16384) for heads in HEADS),
    *(Shape(f"n{n}-h{heads}-d64", (1, 1, n), heads, 64) for n in TOKENS for heads in HEADS),
    *(Shape(f"n{n}-h16-d96", (1, 1, n), 16, 96) for n in (4096, 16384, 32760)),
)

CASES = (
    *(plain_case(shape) for shape in (*SHAPES, *LENGTHS)),
    *(case(shape, source) for shape in (*SHAPES, *LENGTHS) for source in SOURCES),
    *(case(WAN_1_3B_480P, source, share) for source in SOURCES for share in SHARES if share != SHARE),
    *(case(WAN_1_3B_480P, source, SHARE, ratio) for source in SOURCES for ratio in (0.0, 1.0)),
    HOPPER,
    *(compiled("attention-in-loop", in_loop, source) for source in SOURCES),
    *(compiled("attention-one-launch", persistent, source) for source in SOURCES),
)
