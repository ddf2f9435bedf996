"""Attention to mixed keys and values, each way of it, beside plain attention by torch's backends, forced by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from benchmarks.lerp import RATIO, SHARE, exact, make_pair

SOURCES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)
CORE = (SMALL_H12, WAN_1_3B_480P)
CHECKED = 64  # queries of each head that are checked: fp64 scores of all of them do not fit a GPU
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA FLASH": SDPBackend.FLASH_ATTENTION,
    "SDPA EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
}


def make(shape: Shape, device: str, seed: int, *, source: torch.dtype) -> Inputs:
    """Arguments of kv_lerp_attention_."""
    q = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=1000 + seed)
    pair = make_pair(shape, device, seed, share=SHARE, source=source, ratio=RATIO)
    return {"q": q, **pair, "scale": shape.dim**-0.5}


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


def forced(backend: SDPBackend) -> Callable[[Inputs], Outputs]:
    def run(inputs: Inputs) -> Outputs:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, scale=inputs["scale"]).transpose(1, 2),)

    return run


def in_loop(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.in_loop import attend_in_loop

    return attend_in_loop(**inputs)[0]


def persistent(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.persistent import attend_persistently_

    return attend_persistently_(**inputs)


def without_rows(**inputs: Any) -> Tensor:
    """The kernel that mixes in its loop, with nothing to mix."""
    q = inputs["q"]
    none, index = q[:, :0], torch.empty(0, dtype=torch.int32, device=q.device)
    return in_loop(**inputs, k_source=none, v_source=none, index=index, ratio=torch.zeros(len(q), device=q.device))


def hopper(**inputs: Any) -> Tensor:
    from kvlock_kernels._triton.hopper import attention

    return attention(**inputs, return_lse=False)[0]


def launcher(name: str, function: Callable[..., Tensor]) -> Provider:
    """A launcher called directly; it wants a GPU, and raises where that is too old."""
    return Provider(name, lambda inputs: (function(**inputs),), needs_gpu=True)


def flex(inputs: Inputs) -> Outputs:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return (flex_attention(q, k, v, scale=inputs["scale"]).transpose(1, 2),)


def sage(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """int8 products of q and k: the check allows it more."""
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD", sm_scale=scale)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return first(flash_attn_func(q, k, v, softmax_scale=scale))


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return first(flash_attn_func(q, k, v, softmax_scale=scale))


def first(result: Any) -> Tensor:
    """Some versions return the log-sum-exp too."""
    return result[0] if isinstance(result, tuple) else result


PLAIN = (
    *(Provider(name, forced(backend), needs_gpu=True) for name, backend in BACKENDS.items()),
    Provider("FlexAttention", flex, compiled=True, needs_gpu=True),
    launcher("SageAttention", sage)._replace(roundings=16),
    launcher("flash-attn 2", flash_attn_2),
    launcher("flash-attn 3", flash_attn_3),
    launcher("flash-attn 4", flash_attn_4),
    launcher("kvlock in loop, no rows", without_rows),
    launcher("kvlock sm_90", hopper),
)
WAYS = (ours("kv_lerp_attention_"), launcher("in loop", in_loop), launcher("one launch", persistent))


def plain_case(shape: Shape) -> Case:
    """The yardstick."""
    return Case(
        "attention", shape, "bf16", "", "no rows", make_plain, work, check_plain, PLAIN,
        core=shape in CORE, offline=shape == WAN_1_3B_480P, launch=without_rows,
    )


def case(shape: Shape, source: torch.dtype) -> Case:
    return Case(
        "kv_lerp_attention_", shape, "bf16", NAMES[source], f"share {SHARE:g}, ratio {RATIO:g}",
        partial(make, source=source), work, check, WAYS, core=shape in CORE and source == torch.int8,
    )


def compiled(name: str, launch: Callable[..., Tensor], source: torch.dtype) -> Case:
    """One way for the table of compiled kernels; it is measured as a provider of the case above."""
    return Case(
        name, WAN_1_3B_480P, "bf16", NAMES[source], "", partial(make, source=source), work, check, (),
        offline=True, launch=launch,
    )


HOPPER = Case(
    "attention-sm_90", WAN_1_3B_480P, "bf16", "", "", make_plain, work, check_plain, (),
    offline=True, launch=hopper, archs=(90,), wide=False,
)  # fmt: skip


LENGTHS = (
    *(Shape(f"n{n}-h{heads}", (1, 1, n), heads) for n in (8192, 16384) for heads in (12, 40)),
    Shape("n75600-h12", (1, 1, 75600), 12),
    *(Shape(f"n{n}-h24-d64", (1, 1, n), 24, 64) for n in (4096, 16384, 32760)),
    *(Shape(f"n{n}-h16-d96", (1, 1, n), 16, 96) for n in (4096, 16384, 32760)),
)

CASES = (
    *(plain_case(shape) for shape in (*SHAPES, *LENGTHS)),
    *(case(shape, source) for shape in (*SHAPES, *LENGTHS) for source in SOURCES),
    HOPPER,
    *(compiled("attention-in-loop", in_loop, source) for source in SOURCES),
    *(compiled("attention-one-launch", persistent, source) for source in SOURCES),
)
