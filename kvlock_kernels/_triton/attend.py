"""kv_lerp_attention and kv_lerp_attention_: which way a call goes on which GPU, by one table."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from kvlock_kernels._triton.in_loop import attend_in_loop
from kvlock_kernels._triton.lerp import kv_lerp_pair_
from kvlock_kernels._triton.persistent import attend_persistently_
from kvlock_kernels._triton.plain import OWN, REST, own_kernel, plain_attention

LERP_FIRST, IN_LOOP, ONE_LAUNCH = "lerp first", "in the loop", "one launch"
TORCH = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)


class Choice(NamedTuple):
    """A line of the table: where it applies, and what happens there."""

    capability: int  # major number of the compute capability, or a newer one
    source: torch.dtype | None  # of the keys' source rows, or any
    dim: int | None  # D, or any
    tokens: int  # the fewest queries and keys
    way: str
    plain: tuple[str | SDPBackend, ...]  # after LERP_FIRST: the first of these that serves the call


# The first line that applies. Rows of benchmarks/results chose them, all in bf16:
# - The way, for source rows of every dtype: at 4096 tokens mixing first takes 1.08 to 1.10 times as long as plain
#   attention on an H200; on an H100 mixing in the loop takes 4 (bf16) to 10 times (int8) as long as that, one launch
#   3.6 times; at 32760 tokens one launch takes twice as long, and the loop 2.9 times before it mixes anything (H200).
#   The cost model would mix in the loop before Hopper and where tokens are few. By these rows it is wrong about that
#   kernel, so that mixing first stands there too until something is measured.
# - Plain attention on an H200, at D = 128: with 12 heads the own kernel takes 0.93 and 0.91 times cuDNN's time at 32760
#   and 75600 tokens, and 1.12, 1.02 and 1.01 times at 4096, 8192 and 16384; with 40 heads 0.92 and 0.91 at 32760 and
#   75600, and 1.09, 1.01 and 0.98 below. cuDNN reaches 590 TFLOP/s at 32760 tokens, FLASH 360, EFFICIENT 180.
# - At D = 64: 0.94 and 0.93 times with 12 heads at 32760 and 75600 tokens, 1.16, 1.14 and 1.06 below; 0.93 with 40 at
#   32760. At D = 96 it takes 1.08, 0.99 and 0.90 times at 4096, 16384 and 32760 tokens of 16 heads; no model asks for
#   it, and cuDNN, the fastest of torch's elsewhere, is taken there too. Before Hopper that is FLASH, which is
#   FlashAttention-2.
# - FlashAttention's own packages can be named here, and are asked where they can be imported. None is before a row
#   shows it right and faster: the third is published at 638, 646 and 648 TFLOP/s for 4096, 8192 and 16384 tokens on an
#   H100, where cuDNN was measured at 634, 660 and 626; the fourth at up to 1.3 times cuDNN's rate on a B200.
TABLE = (
    Choice(9, None, 128, 32760, LERP_FIRST, (OWN, *TORCH)),
    Choice(9, None, 64, 32760, LERP_FIRST, (OWN, *TORCH)),
    Choice(9, None, None, 0, LERP_FIRST, TORCH),
    Choice(8, None, None, 0, LERP_FIRST, (SDPBackend.FLASH_ATTENTION, *REST)),
)


def kv_lerp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_source: Tensor,
    *args: Tensor,
    scale: float,
    return_lse: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`: mixes copies of k and v, unless it mixes in the loop.

    Torch's attention keeps the log-sum-exp to itself: it comes from this package's kernel for sm_90 where the table has
    that one, and otherwise from the one that mixes in its loop.
    """
    line = choice(q, k, k_source)
    own = own_kernel(q, k, scale) if return_lse and OWN in line.plain else None
    if line.way == IN_LOOP or (return_lse and own is None):
        return attend_in_loop(q, k, v, k_source, *args, scale=scale, return_lse=return_lse, **options)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    if own is not None:
        kv_lerp_pair_(k, v, k_source, *args, **options)
        return own(q, k, v, scale=scale, return_lse=True)
    out = kv_lerp_attention_(q, k, v, k_source, *args, scale=scale, **options)
    return out, q.new_empty(0, dtype=torch.float32)


def kv_lerp_attention_(
    q: Tensor, k: Tensor, v: Tensor, k_source: Tensor, *args: Tensor, scale: float, **options: Any
) -> Tensor:
    """See `kvlock_kernels.kv_lerp_attention_`."""
    ways = {LERP_FIRST: lerp_then_attend_, IN_LOOP: in_loop, ONE_LAUNCH: attend_persistently_}
    return ways[choice(q, k, k_source).way](q, k, v, k_source, *args, scale=scale, **options)


def in_loop(*args: Tensor, **options: Any) -> Tensor:
    return attend_in_loop(*args, **options)[0]


def lerp_then_attend_(
    q: Tensor, k: Tensor, v: Tensor, k_source: Tensor, *args: Tensor, scale: float, **options: Any
) -> Tensor:
    """Mixes k and v in place, then attends to them."""
    kv_lerp_pair_(k, v, k_source, *args, **options)
    return plain_attention(q, k, v, scale, choice(q, k, k_source).plain)


def choice(q: Tensor, k: Tensor, k_source: Tensor) -> Choice:
    """The line for q [B, M, H, D], k [B, N, H, D] and source rows of keys."""
    capability, _ = torch.cuda.get_device_capability(k.device)
    tokens = min(q.shape[1], k.shape[1])
    return next(
        line
        for line in TABLE
        if capability >= line.capability
        and line.source in (None, k_source.dtype)
        and line.dim in (None, k.shape[3])
        and tokens >= line.tokens
    )
