"""QK norm, RoPE and the lock in one pass, beside the same pass without the lock and beside what diffusers runs."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kvlock_kernels
from benchmarks import packing
from benchmarks._case import (
    NAMES,
    SMALL_H12,
    SMALL_H40,
    WAN_1_3B_480P,
    WAN_1_3B_720P,
    WAN_5B_480P,
    WAN_14B_480P,
    WAN_14B_720P,
    Case,
    Check,
    Inputs,
    Outputs,
    Provider,
    Shape,
    Traffic,
    background,
    background_rows,
    close,
    formula,
    normal,
    ours,
    worst,
)
from kvlock_kernels import reference

SHARE, RATIO, EPS = 0.8, 0.3, 1e-6
SHARES = (0.25, 0.5, 0.8, 1.0)
CHANGED = ("q", "k", "v")


def projections(shape: Shape, device: str, seed: int, share: float) -> tuple[Inputs, Tensor]:
    """What both operators take, and the index behind source_row.

    Weights are 1 or -1: a pass that is timed over and over on its own results must not make them vanish.
    """
    n, c, d = shape.tokens, shape.heads * shape.dim, shape.dim
    qkv = {name: normal(1, n, c, device=device, seed=8 * seed + i) for i, name in enumerate(CHANGED)}
    weights = {f"{name}_weight": normal(c, device=device, seed=8 * seed + i).sign() for i, name in enumerate("qk", 3)}
    angle = normal(n, d // 2, device=device, seed=8 * seed + 5, dtype=torch.float32).repeat_interleave(2, 1)
    index = background(shape, share, "cpu")
    source_row = torch.full((n,), -1, dtype=torch.int32)
    source_row[index.long()] = torch.arange(len(index), dtype=torch.int32)
    common = {"cos": angle.cos(), "sin": angle.sin(), "source_row": source_row.to(device), "eps": EPS}
    return qkv | weights | common, index.to(device)


def make(
    shape: Shape, device: str, seed: int, *, share: float, source: torch.dtype, ratio: float = RATIO
) -> Inputs:
    """Arguments of qk_norm_rope_kv_lerp_."""
    inputs, index = projections(shape, device, seed, share)
    for i, name in enumerate("kv", 6):
        rows = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=8 * seed + i)
        mean = rows.mean(1, dtype=torch.float32) if name == "k" and source != torch.bfloat16 else None
        data, scale = kvlock_kernels.pack_kv(rows, index, source, mean=mean)
        inputs |= {f"{name}_source": data, f"{name}_scale": scale, f"{name}_mean": mean}
    return inputs | {"ratio": torch.full((1,), ratio, device=device)}


def make_pack(shape: Shape, device: str, seed: int, *, source: torch.dtype, share: float = SHARE) -> Inputs:
    """Arguments of qk_norm_rope_kv_pack_."""
    inputs, index = projections(shape, device, seed, share)
    return inputs | {"rows": len(index), "dtype": source}


def norm(before: Inputs, name: str) -> Tensor:
    """The norm in fp64: [B, N, H, D]."""
    x = before[name].double()
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * before[f"{name}_weight"].double()
    return normed.unflatten(2, (-1, before["cos"].shape[1]))


def rope(before: Inputs, x: Tensor) -> Tensor:
    """The rotation in fp64: [B, N, C]."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = before["cos"].double()[:, None, 0::2], before["sin"].double()[:, None, 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(2)


def mixed(before: Inputs, name: str, x: Tensor) -> Tensor:
    """The lerp in fp64, of x [B, N, H, D] as a new tensor."""
    source, scale, mean = (before[f"{name}_{part}"] for part in ("source", "scale", "mean"))
    s = source.double() if scale is None else source.double() * scale.double()[..., None]
    s = s if mean is None else s + mean.double()[:, None]
    locked, x = before["source_row"] >= 0, x.clone()
    rows = s[:, before["source_row"][locked].long()]
    x[:, locked] = (1 - before["ratio"].double()) * x[:, locked] + before["ratio"].double() * rows
    return x


def check(before: Inputs, after: Outputs) -> Check:
    """One rounding of each result."""
    v = before["v"].double().unflatten(2, (-1, before["cos"].shape[1]))
    k = rope(before, mixed(before, "k", norm(before, "k")))
    return close(after, (rope(before, norm(before, "q")), k, mixed(before, "v", v).flatten(2)), 1)


def check_pack(before: Inputs, after: Outputs) -> Check:
    """One rounding of queries and keys; packed rows as near to the exact ones as `pack_kv`'s must be."""
    k, dtype = norm(before, "k"), before["dtype"]
    v = before["v"].double().unflatten(2, k.shape[2:])
    rotated, packed = after[:2], after[2:]
    checks = [close(rotated, (rope(before, norm(before, "q")), rope(before, k)), 1)]
    locked = before["source_row"] >= 0  # rows are in the order of their tokens
    each = len(packed) // 2
    for rows, result in ((k[:, locked], packed[:each]), (v[:, locked], packed[each:])):
        checks.append(packing.check_rows(rows, dtype, result))
    return worst(checks)


def traffic(
    shape: Shape, *, share: float, source: torch.dtype, ratio: float = RATIO, packs: bool = False
) -> Traffic:
    """Queries and keys read and written, cos and sin once for all heads, and the locked share of the rest.

    At ratio 0 there is no rest, at ratio 1 locked keys and values are not read.
    """
    locked = background_rows(shape, share) / shape.tokens if share and ratio else 0.0
    stored = 2 * (source.itemsize + (4 / shape.dim if source.itemsize == 1 else 0))
    if packs:
        rest = (locked * 2, "v"), (locked * stored, "rows packed")
    else:
        rest = (locked * 4, "v, v written") if ratio < 1 else (locked * 2, "v written"), (locked * stored, "source")
    read = 4 - 2 * locked if ratio == 1 else 4.0
    terms = (read, "q, k"), (8 / shape.heads, "cos, sin"), (4.0, "q, k written"), *(rest if locked else ())
    return Traffic(shape.tokens * shape.heads * shape.dim, terms)


def diffusers_sequence(inputs: Inputs) -> Outputs:
    """The steps of diffusers' Wan attention, each rounded to the model's dtype: norm, the hooks' lerp, RoPE.

    The hooks have an index of rows, made once; `with_index` adds it.
    """
    heads, index = (-1, inputs["cos"].shape[1]), inputs["index"]
    cos, sin = inputs["cos"][:, None, 0::2], inputs["sin"][:, None, 1::2]

    def normed(name: str) -> Tensor:
        x = inputs[name]
        return F.rms_norm(x, x.shape[2:], inputs[f"{name}_weight"], EPS).unflatten(2, heads)

    def rotated(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return y.flatten(2)

    k, v = normed("k"), inputs["v"].unflatten(2, heads)
    if len(index):
        for x, name in ((k, "k"), (v, "v")):
            source, scale, mean = (inputs[f"{name}_{part}"] for part in ("source", "scale", "mean"))
            reference.kv_lerp_(x, source, index, inputs["ratio"], source_scale=scale, source_mean=mean)
    return rotated(normed("q")), rotated(k), v.flatten(2)


def with_index(inputs: Inputs) -> Inputs:
    return inputs | {"index": reference.index_of(inputs["source_row"], inputs["k_source"].shape[1])}


def case(shape: Shape, source: torch.dtype, share: float, ratio: float = RATIO) -> Case:
    setting: dict[str, Any] = {"share": share, "source": source, "ratio": ratio}
    sequence = Provider("diffusers, eager", diffusers_sequence, prepare=with_index, roundings=3, libraries=("torch",))
    compiled = sequence._replace(name="diffusers, compiled", compiled=True)
    plain = formula(reference.qk_norm_rope_kv_lerp_, *CHANGED)
    short = (shape, source, ratio) == (WAN_1_3B_480P, torch.bfloat16, RATIO) and share in (SHARE, 0)
    return Case(
        "qk_norm_rope_kv_lerp_", shape, "bf16", NAMES[source],
        f"share {share:g}, ratio {ratio:g}" if share else "without the lock",
        partial(make, **setting), partial(traffic, **setting), check,
        (ours("qk_norm_rope_kv_lerp_"), sequence, compiled, *plain),
        core=("kvlock", sequence.name, compiled.name) if short else (),
        offline=(share, ratio) == (SHARE, RATIO) and compiled_offline(shape, source),
    )


def pack_case(shape: Shape, source: torch.dtype, share: float = SHARE) -> Case:
    return Case(
        "qk_norm_rope_kv_pack_", shape, "bf16", NAMES[source], f"share {share:g}",
        partial(make_pack, source=source, share=share), partial(traffic, share=share, source=source, packs=True),
        check_pack, (packed_by_us(), *packed_by_formula()),
        offline=share == SHARE and compiled_offline(shape, source),
    )


def packed_by_us() -> Provider:
    """Queries, keys and then the packed rows, in the order of the operator's results."""
    provider = ours("qk_norm_rope_kv_pack_")

    def run(inputs: Inputs) -> Outputs:
        q, k = inputs["q"], inputs["k"]
        rows = kvlock_kernels.qk_norm_rope_kv_pack_(**inputs)
        return tuple(t for t in (q, k, *rows.k, *rows.v) if t is not None)

    return provider._replace(run=run)


def packed_by_formula() -> tuple[Provider, Provider]:
    def run(inputs: Inputs) -> Outputs:
        rows = reference.qk_norm_rope_kv_pack_(**inputs)
        return inputs["q"], inputs["k"], *(t for t in rows if t.numel())

    eager = Provider("eager", run, libraries=("torch",))
    return eager, eager._replace(name="torch.compile", compiled=True)


def compiled_offline(shape: Shape, source: torch.dtype) -> bool:
    """Few heads and the largest tile, each with both kinds of source."""
    return (shape, source) in (
        (WAN_1_3B_480P, torch.bfloat16), (WAN_1_3B_480P, torch.int8), (WAN_14B_480P, torch.bfloat16),
        (WAN_14B_480P, torch.int8),
    )


SHAPES = (  # the pass is that of Wan
    WAN_1_3B_480P, WAN_1_3B_720P, WAN_14B_480P, WAN_14B_720P, WAN_5B_480P, SMALL_H12, SMALL_H40,
)  # fmt: skip
SOURCES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)
CASES = (
    *(case(shape, source, SHARE) for shape in SHAPES for source in SOURCES),
    *(case(shape, torch.bfloat16, 0.0) for shape in SHAPES),
    *(case(WAN_1_3B_480P, source, share) for source in SOURCES for share in SHARES if share != SHARE),
    *(case(WAN_1_3B_480P, source, SHARE, ratio) for source in SOURCES for ratio in (0.0, 1.0)),
    *(pack_case(shape, source) for shape in SHAPES for source in SOURCES),
    *(pack_case(WAN_1_3B_480P, source, share) for source in SOURCES for share in SHARES if share != SHARE),
)
