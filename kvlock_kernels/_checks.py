"""Checks at the door: each raises a ValueError with the name of the argument, what was found and what is wanted.

They look at types, dtypes, devices, shapes and strides only, so they never wait for the device and work while tracing.
"""

import math

import torch
from torch import Tensor

from kvlock_kernels.reference import EIGHT_BIT

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
FP32 = torch.finfo(torch.float32)
Shape = tuple[int, ...]
LerpNames = tuple[str, str, str, str]  # of x, source, scale, mean


def refuse(name: str, found: object, wanted: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{name}: found {found}, wanted {wanted}")


def check_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Wants a tensor of one of `dtypes`, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise refuse(name, f"{type(value).__name__} {value!r}", "a tensor")
    if value.dtype not in dtypes:
        raise refuse(name, f"dtype {_word(value.dtype)}", "dtype " + " or ".join(_word(dtype) for dtype in dtypes))
    if like is not None and value.device != like.device:
        raise refuse(name, f"device {value.device}", f"device {like.device}")


def check_shape(name: str, value: Tensor, letters: str, *shapes: Shape) -> None:
    """Wants one of `shapes`, called `letters` in the message."""
    if not any(_same(value.shape, shape) for shape in shapes):
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise refuse(name, f"shape {list(value.shape)}", f"{letters} = {wanted}")


def _same(found: Shape, wanted: Shape) -> bool:
    # Side by side, because the compiler takes any two tuples with a symbolic size in them for different ones.
    return len(found) == len(wanted) and all(one == other for one, other in zip(found, wanted, strict=True))


def check_ndim(name: str, value: Tensor, letters: str, *ndims: int) -> None:
    """Wants one of `ndims` axes, described by `letters`."""
    if value.ndim not in ndims:
        raise refuse(name, f"shape {list(value.shape)}", letters)


def check_broadcast(name: str, value: Tensor, shape: Shape) -> None:
    """Wants a shape that broadcasts to `shape` without enlarging it."""
    fits = value.ndim <= len(shape) and all(
        found in (1, wanted) for found, wanted in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise refuse(name, f"shape {list(value.shape)}", f"a shape that broadcasts to {list(shape)}")


def check_writable(name: str, value: Tensor) -> None:
    """Wants every element in its own place in memory: each step beyond all that the smaller ones reach together.

    Slices, permutations and splits of such a tensor are such too. Strides that interleave without meeting, which only
    `as_strided` makes, are refused as well.
    """
    if value.is_contiguous():
        return
    axes = [(stride, stride * (size - 1)) for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    for stride, own in axes:  # each with all, because the compiler does not sort symbolic strides
        reach = -own
        for other, length in axes:
            if other <= stride:
                reach += length
        if stride <= reach:
            layout = f"shape {list(value.shape)} with strides {list(value.stride())}"
            raise refuse(name, f"an expanded or overlapping tensor of {layout}", "one that can be written")


def check_per_sample(name: str, value: Tensor, samples: int, like: Tensor) -> None:
    """Wants fp32 [] or [B]."""
    check_tensor(name, value, (torch.float32,), like)
    check_shape(name, value, "[] or [B]", (), (samples,))


def check_number(
    name: str, value: float, wanted: str, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> None:
    """Wants a Python number in [low, high] that fp32 holds; when `above`, a normal fp32 number above low."""
    # Chained comparisons refuse NaN and, unlike math.isfinite, trace when the compiler makes the number symbolic.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (-FP32.max <= value <= FP32.max and low <= value <= high)
        or (above and value < low + FP32.tiny)
    ):
        raise refuse(name, repr(value), wanted)


def check_bool(name: str, value: bool) -> None:
    """Wants True or False."""
    if not isinstance(value, bool):
        raise refuse(name, repr(value), "True or False")


def check_index(index: Tensor, tokens: int, like: Tensor) -> None:
    """Wants int32 [rows] with no more rows than tokens."""
    check_tensor("index", index, (torch.int32,), like)
    check_ndim("index", index, "[rows]", 1)
    if index.shape[0] > tokens:
        raise refuse("index", f"{index.shape[0]} rows", f"at most N = {tokens}")


def check_packing(names: tuple[str, str, str], data: Tensor, scale: Tensor | None, mean: Tensor | None) -> None:
    """Wants a scale (and perhaps a mean) beside 8-bit rows [B, rows, H, D], neither beside rows of a floating dtype."""
    data_name, scale_name, mean_name = names
    if data.dtype in EIGHT_BIT:
        check_ndim(data_name, data, "[B, rows, H, D] where it is 8-bit", 4)
        if scale is None:
            raise refuse(scale_name, "None", f"[B, rows, H] fp32, because {data_name} is {_word(data.dtype)}")
        check_tensor(scale_name, scale, (torch.float32,), data)
        check_shape(scale_name, scale, "[B, rows, H]", tuple(data.shape[:3]))
        if mean is not None:
            check_mean(mean_name, mean, data)
        return
    for name, value in ((scale_name, scale), (mean_name, mean)):
        if value is not None:
            raise refuse(name, "a value", f"None, because {data_name} is {_word(data.dtype)} and not 8-bit")


def check_mean(name: str, mean: Tensor, x: Tensor) -> None:
    """Wants fp32 [1, H, D] or [B, H, D] beside x [B, rows, H, D]."""
    check_tensor(name, mean, (torch.float32,), x)
    b, _, h, d = x.shape
    check_shape(name, mean, "[1, H, D] or [B, H, D]", (1, h, d), (b, h, d))


def check_lerp(
    names: LerpNames,
    x: Tensor,
    source: Tensor,
    index: Tensor,
    ratio: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
) -> None:
    """Wants x to change in place, [B, N, H, D] or [B, N, C], and what `check_rows` wants."""
    check_tensor(names[0], x, FLOATING)
    check_ndim(names[0], x, "[B, N, H, D] or [B, N, C]", 3, 4)
    check_writable(names[0], x)
    check_rows(names, x, source, index, ratio, scale, mean)


def check_rows(
    names: LerpNames,
    x: Tensor,
    source: Tensor,
    index: Tensor,
    ratio: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
) -> None:
    """Wants ratio [B], index [rows] and source rows that fit x, packed or not."""
    check_ratio(ratio, x)
    check_index(index, x.shape[1], x)
    check_source(names, x, source, index.shape[0], scale, mean)


def check_ratio(ratio: Tensor, x: Tensor) -> None:
    """Wants fp32 [B]."""
    check_tensor("ratio", ratio, (torch.float32,), x)
    check_shape("ratio", ratio, "[B]", (x.shape[0],))


def check_source(
    names: LerpNames, x: Tensor, source: Tensor, rows: int, scale: Tensor | None, mean: Tensor | None
) -> None:
    """Wants `rows` source rows that fit x, packed or not."""
    b, inner = x.shape[0], tuple(x.shape[2:])
    check_tensor(names[1], source, (*FLOATING, *EIGHT_BIT), x)
    if x.ndim == 3 and source.ndim == 4 and source.shape[2] * source.shape[3] == x.shape[2]:
        inner = tuple(source.shape[2:])  # [H, D] beside x's flat C
    check_shape(names[1], source, "[Bs, rows, ...]", (1, rows, *inner), (b, rows, *inner))
    check_packing(names[1:], source, scale, mean)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
