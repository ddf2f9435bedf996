"""pack_kv and unpack_kv beside plain PyTorch, eager and compiled."""

from functools import partial

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
)
from kvlock_kernels import reference

PACKED = (torch.float8_e4m3fn, torch.int8)
SHARE = 0.8
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def make(shape: Shape, device: str, seed: int, *, dtype: torch.dtype) -> Inputs:
    """Arguments of pack_kv."""
    x = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=seed)
    mean = x.mean(1, dtype=torch.float32) if dtype in PACKED else None
    return {"x": x, "index": background(shape, SHARE, device), "dtype": dtype, "mean": mean}


def make_packed(shape: Shape, device: str, seed: int, *, dtype: torch.dtype) -> Inputs:
    """Arguments of unpack_kv."""
    inputs = make(shape, device, seed, dtype=dtype)
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
    return Check(excess.item(), 4 * torch.finfo(torch.float32).eps)  # a scale, its reciprocal and products in fp32


def check_unpacked(before: Inputs, after: Outputs) -> Check:
    """One rounding."""
    rows = before["data"].double()
    if before["scale"] is not None:
        rows = rows * before["scale"].double()[..., None] + before["mean"].double()[:, None]
    return close(after, (rows,), 1)


def traffic(shape: Shape, *, dtype: torch.dtype, packs: bool) -> Traffic:
    """Rows of bf16 on one side, codes and a scale for each head of a token on the other."""
    terms = [(2.0, "x"), (float(dtype.itemsize), "data")]
    if dtype in PACKED:
        terms.append((4 / shape.dim, "scale"))
    return Traffic(background_rows(shape, SHARE) * shape.heads * shape.dim, tuple(terms if packs else terms[::-1]))


def case(op: str, shape: Shape, dtype: torch.dtype) -> Case:
    packs = op == "pack_kv"
    return Case(
        op, shape, "bf16", NAMES[dtype], f"share {SHARE:g}",
        partial(make if packs else make_packed, dtype=dtype), partial(traffic, dtype=dtype, packs=packs),
        check if packs else check_unpacked, (ours(op), *formula(getattr(reference, op))),
        core=packs and dtype in PACKED and shape == WAN_1_3B_480P, offline=shape == WAN_1_3B_480P,
    )


CASES = tuple(
    case(op, shape, dtype)
    for op in ("pack_kv", "unpack_kv")
    for shape in SHAPES
    for dtype in (torch.bfloat16, *PACKED)
)
