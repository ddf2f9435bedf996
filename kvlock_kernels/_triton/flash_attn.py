"""Plain attention from FlashAttention's later packages, where they can be imported and are thought to be fastest."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Attention = Callable[..., Any]


def flash_attn_3() -> Attention:
    """FlashAttention-3 of package flash-attn-3, for Hopper. Raises ImportError where it is not installed."""
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def flash_attn_4() -> Attention:
    """FlashAttention-4 of package flash-attn-4, for Hopper and Blackwell; raises as above."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func


def attend(function: Attention, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention of q [B, M, H, D] to k, v [B, N, H, D] in fp16 or bf16; some versions return the log-sum-exp too."""
    result = function(q, k, v, softmax_scale=scale)
    return result[0] if isinstance(result, tuple) else result


class Library(NamedTuple):
    """What gives a function, and where that is asked: for these D, from this many queries and keys on."""

    load: Callable[[], Attention]
    dims: tuple[int, ...]
    tokens: int


# By the major number of the compute capability. None of this was measured here, it is what the authors publish:
# - On an H100, D = 128, FlashAttention-3 reaches 638, 646 and 648 TFLOP/s at 4096, 8192 and 16384 tokens. cuDNN was
#   measured at 629, 665 and 633.
# - On a B200, FlashAttention-4 takes down to 1/1.3 of cuDNN's time.
# FlashAttention-2 has no entry: before Hopper torch's FLASH backend is the same kernel.
LIBRARIES = {
    9: Library(flash_attn_3, (128,), 16384),
    10: Library(flash_attn_4, (64, 96, 128), 1),
}


def fastest(q: Tensor, k: Tensor) -> Attention | None:
    """The function to ask for attention of q [B, M, H, D] to k [B, N, H, D]; None where there is none."""
    library = LIBRARIES.get(torch.cuda.get_device_capability(k.device)[0])
    if library is None or k.shape[3] not in library.dims or min(q.shape[1], k.shape[1]) < library.tokens:
        return None
    if q.dtype != k.dtype or k.dtype not in (torch.float16, torch.bfloat16):
        return None
    return installed(library.load)


@functools.cache  # Python looks for a missing module anew each time, for longer than a small attention takes
def installed(load: Callable[[], Attention]) -> Attention | None:
    try:
        return load()
    except ImportError:
        return None
