"""kv_lerp_ and kv_lerp_pair_ beside torch.lerp on a contiguous slice, which moves the same bytes without a gather."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import kvlock_kernels
from benchmarks._case import (
    NAMES,
    SHAPES,
    SMALL_H12,
    WAN_1_3B_480P,
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
    served_by_extension,
    served_by_triton,
)
from kvlock_kernels import reference

SOURCES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)
SHARES = (0.25, 0.5, 0.8, 1.0)
SHARE, RATIO = 0.8, 0.3
PACKED = f"share {SHARE:g}"  # the usual setting of what has no ratio
LOCK = f"{PACKED}, ratio {RATIO:g}"  # the usual setting


def is_usual(setting: str) -> bool:
    """Whether the share and the ratio of a setting, if it has any, are those of cases that vary neither."""
    return "share" not in setting or setting in (LOCK, PACKED)


def make(shape: Shape, device: str, seed: int, *, share: float, source: torch.dtype, ratio: float) -> Inputs:
    """Arguments of kv_lerp_."""
    rows = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=2 * seed)
    index = background(shape, share, device)
    mean = None if source == torch.bfloat16 else rows.mean(1, dtype=torch.float32)
    data, scale = kvlock_kernels.pack_kv(rows, index, source, mean=mean)
    x = normal(1, shape.tokens, shape.heads, shape.dim, device=device, seed=2 * seed + 1)
    a = torch.full((1,), ratio, device=device)
    return {"x": x, "source": data, "index": index, "ratio": a, "source_scale": scale, "source_mean": mean}


def make_pair(shape: Shape, device: str, seed: int, *, share: float, source: torch.dtype, ratio: float) -> Inputs:
    """Arguments of kv_lerp_pair_; as in use, only keys have a mean."""
    k = make(shape, device, 2 * seed, share=share, source=source, ratio=ratio)
    v = make(shape, device, 2 * seed + 1, share=share, source=source, ratio=ratio)
    pair = {"k": k["x"], "v": v["x"], "k_source": k["source"], "v_source": v["source"]}
    options = {"k_scale": k["source_scale"], "v_scale": v["source_scale"], "k_mean": k["source_mean"]}
    return pair | {"index": k["index"], "ratio": k["ratio"]} | options


def exact(x: Tensor, source: Tensor, index: Tensor, ratio: Tensor, scale: Tensor | None, mean: Tensor | None) -> Tensor:
    """The formula in fp64."""
    s, a = source.double(), ratio.double()
    if scale is not None:
        s = s * scale.double()[..., None]
    if mean is not None:
        s = s + mean.double()[:, None]
    result = x.double()
    result[:, index.long()] = (1 - a) * result[:, index.long()] + a * s
    return result


def check(before: Inputs, after: Outputs) -> Check:
    """One rounding: whoever computes in fp32 is within half a step."""
    b = before
    return close(after, (exact(b["x"], b["source"], b["index"], b["ratio"], b["source_scale"], b["source_mean"]),), 1)


def check_pair(before: Inputs, after: Outputs) -> Check:
    """The same for keys and values."""
    b, common = before, (before["index"], before["ratio"])
    k = exact(b["k"], b["k_source"], *common, b["k_scale"], b["k_mean"])
    return close(after, (k, exact(b["v"], b["v_source"], *common, b["v_scale"], None)), 1)


def traffic(shape: Shape, *, share: float, source: torch.dtype, ratio: float, tensors: int = 1) -> Traffic:
    """At ratio 0 nothing moves, at ratio 1 x is not read; the index is left out, 0.1 % and less."""
    elements = tensors * background_rows(shape, share) * shape.heads * shape.dim
    if ratio == 0:
        return Traffic(elements, ())
    scale = ((4 / shape.dim, "scale"),) if source.itemsize == 1 else ()
    terms = (2.0, "x"), (float(source.itemsize), "source"), *scale, (2.0, "written")
    return Traffic(elements, terms if ratio < 1 else terms[1:])


def first_rows(inputs: Inputs) -> Inputs:
    """The same number of rows, but contiguous ones."""
    index = inputs["index"]
    return inputs | {"index": torch.arange(index.shape[0], dtype=index.dtype, device=index.device)}


def torch_lerp(ratio: float) -> Provider:
    """torch.lerp in place on a contiguous slice: rows without a gather, as many bytes."""

    def run(inputs: Inputs) -> Outputs:
        inputs["x"][:, : inputs["source"].shape[1]].lerp_(inputs["source"], ratio)
        return (inputs["x"],)

    return Provider("torch.lerp", run, prepare=first_rows, libraries=("torch",))


def case(shape: Shape, share: float, source: torch.dtype, ratio: float) -> Case:
    setting: dict[str, Any] = {"share": share, "source": source, "ratio": ratio}
    providers = [ours("kv_lerp_"), served_by_triton("kv_lerp_", "x"), served_by_extension("kv_lerp_", "x")]
    if 0 < ratio < 1:  # at the ends the others do all of the work
        providers += [torch_lerp(ratio)] if source == torch.bfloat16 else []
        providers += formula(reference.kv_lerp_, "x")
    headline = shape == WAN_1_3B_480P and (share, ratio) == (SHARE, RATIO)
    core: tuple[str, ...] = ("kvlock",) if shape in (WAN_1_3B_480P, WAN_14B_720P, SMALL_H12) else ()
    if headline and source == torch.bfloat16:
        core += "torch.lerp", "torch.compile"
    short = (share, ratio) == (SHARE, RATIO) and (headline or source == torch.bfloat16)
    return Case(
        "kv_lerp_", shape, "bf16", NAMES[source], f"share {share:g}, ratio {ratio:g}",
        partial(make, **setting), partial(traffic, **setting), check, tuple(providers),
        core=core if short else (), offline=headline,
    )


def pair_case(shape: Shape, share: float, source: torch.dtype, ratio: float) -> Case:
    setting: dict[str, Any] = {"share": share, "source": source, "ratio": ratio}
    headline = shape == WAN_1_3B_480P and (share, ratio) == (SHARE, RATIO)
    others = formula(reference.kv_lerp_pair_, "k", "v") if 0 < ratio < 1 else ()  # as above
    return Case(
        "kv_lerp_pair_", shape, "bf16", NAMES[source], f"share {share:g}, ratio {ratio:g}",
        partial(make_pair, **setting), partial(traffic, **setting, tensors=2), check_pair,
        (ours("kv_lerp_pair_"), *others),
        core=("kvlock",) if headline and source != torch.float8_e4m3fn else (), offline=headline,
    )


CASES = (
    *(case(shape, share, source, RATIO) for shape in SHAPES for source in SOURCES for share in SHARES),
    *(case(WAN_1_3B_480P, SHARE, source, ratio) for source in SOURCES for ratio in (0.0, 1.0)),
    *(pair_case(shape, SHARE, source, RATIO) for shape in SHAPES for source in SOURCES),
    *(pair_case(WAN_1_3B_480P, share, source, RATIO) for source in SOURCES for share in SHARES if share != SHARE),
    *(pair_case(WAN_1_3B_480P, SHARE, source, ratio) for source in SOURCES for ratio in (0.0, 1.0)),
)
