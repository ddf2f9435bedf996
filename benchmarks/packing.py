"""pack_kv and unpack_kv beside plain PyTorch, eager and compiled."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvlock_kernels
from benchmarks._case import (
    NAMES,
    SHAPES,
    WAN_1_3B_480P,
    Case,
    Check,
    Inputs,
    Outputs,
    Shape,
    Traffic,
    background,
    background_rows,
    close,
    formula,
    normal,
    ours,
    served_by_extension,
    served_by_triton,
)
from kvlock_kernels import reference

PACKED = (torch.float8_e4m3fn, torch.int8)
SHARE = 0.8
SHARES = (0.25, 0.5, 0.8, 1.0)
CORE = {torch.float8_e4m3fn: ("kvlock",), torch.int8: ("kvlock", "Triton", "C++", "torch.compile")}
CPU_TARGETS = {("pack_kv", "bf16"): 0.5, ("pack_kv", "e4m3"): 0.25, ("pack_kv", "int8"): 0.25}  # of memcpy, one core
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def make(shape: Shape, device: str, seed: int, *, dtype: torch.dtype, share: float = SHARE) -> Inputs:
    """Arguments of pack_kv."""
    x = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=seed)
    mean = x.mean(1, dtype=torch.float32) if dtype in PACKED else None
    return {"x": x, "index": background(shape, share, device), "dtype": dtype, "mean": mean}


def make_packed(shape: Shape, device: str, seed: int, *, dtype: torch.dtype, share: float = SHARE) -> Inputs:
    """Arguments of unpack_kv."""
    inputs = make(shape, device, seed, dtype=dtype, share=share)
    data, scale = kvlock_kernels.pack_kv(**inputs)
    return {"data": data, "scale": scale, "mean": inputs["mean"], "dtype": torch.bfloat16}


def nearest(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the codes of fp64 arithmetic give them back."""
    scale = rows.abs().amax(-1, keepdim=True) / LIMITS[dtype]
    code = rows / scale.where(scale > 0, 1.0)
    return (code.round() if dtype == torch.int8 else code.to(dtype).double()) * scale


def check(before: Inputs, after: Outputs) -> Check:
    """The rows less their mean, packed."""
    rows = before["x"][:, before["index"].long()].double()
    if before["mean"] is not None:
        rows -= before["mean"].double()[:, None]
    return check_rows(rows, before["dtype"], after)


def check_rows(rows: Tensor, dtype: torch.dtype, packed: Outputs) -> Check:
    """No element may lie farther from its row than the nearest code; between two equally near ones either is right."""
    if dtype not in PACKED:
        return close(packed[:1], (rows,), 1)
    data, scale = packed
    distance = (data.double() * scale.double()[..., None] - rows).abs()
    excess = (distance - (nearest(rows, dtype) - rows).abs()).max() / rows.abs().max()
    allowed = 4 * torch.finfo(torch.float32).eps  # a scale, its reciprocal and products in fp32
    return Check(excess.item(), allowed, (distance.norm() / rows.norm()).item())


def check_unpacked(before: Inputs, after: Outputs) -> Check:
    """One rounding."""
    rows = before["data"].double()
    if before["scale"] is not None:
        rows = rows * before["scale"].double()[..., None] + before["mean"].double()[:, None]
    return close(after, (rows,), 1)


def traffic(shape: Shape, *, dtype: torch.dtype, packs: bool, share: float = SHARE) -> Traffic:
    """Rows of bf16 on one side, codes and a scale for each head of a token on the other."""
    terms = [(2.0, "x"), (float(dtype.itemsize), "data")]
    if dtype in PACKED:
        terms.append((4 / shape.dim, "scale"))
    return Traffic(background_rows(shape, share) * shape.heads * shape.dim, tuple(terms if packs else terms[::-1]))


def case(op: str, shape: Shape, dtype: torch.dtype, share: float = SHARE) -> Case:
    packs = op == "pack_kv"
    setting: dict[str, Any] = {"dtype": dtype, "share": share}
    return Case(
        op, shape, "bf16", NAMES[dtype], f"share {share:g}",
        partial(make if packs else make_packed, **setting), partial(traffic, packs=packs, **setting),
        check if packs else check_unpacked,
        (ours(op), served_by_triton(op), served_by_extension(op), *formula(getattr(reference, op))),
        core=CORE.get(dtype, ()) if packs and (shape, share) == (WAN_1_3B_480P, SHARE) else (),
        offline=(shape, share) == (WAN_1_3B_480P, SHARE),
    )


OPS, DTYPES = ("pack_kv", "unpack_kv"), (torch.bfloat16, *PACKED)
CASES = (
    *(case(op, shape, dtype) for op in OPS for shape in SHAPES for dtype in DTYPES),
    *(case(op, WAN_1_3B_480P, dtype, share) for op in OPS for dtype in DTYPES for share in SHARES if share != SHARE),
)
