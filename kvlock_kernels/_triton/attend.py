"""kv_lerp_attention and kv_lerp_attention_: which way a call goes on which GPU, by one table."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlock_kernels._triton.in_loop import attend_in_loop
from kvlock_kernels._triton.lerp import kv_lerp_pair_
from kvlock_kernels._triton.persistent import attend_persistently_

LERP_FIRST, IN_LOOP, ONE_LAUNCH = "lerp first", "in the loop", "one launch"
OWN = "the kernel of this package for sm_90"
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # for what the others do not serve, such as fp32


class Choice(NamedTuple):
    """A line of the table: where it applies, and what happens there."""

    capability: int  # major number of the compute capability
    dim: int | None  # D, or any
    tokens: int  # the fewest queries and keys
    way: str
    plain: tuple[str | SDPBackend, ...]  # after LERP_FIRST: the first of these that serves the call


# The first line that applies. Rows of benchmarks/results, all from one H100 in bf16, chose them:
# - The way, for rows of every dtype: at 4096 tokens mixing first takes 1.11 times as long as plain attention, mixing in
#   the loop 4 (bf16) to 11 times (int8) as long as that, one launch 3.6 times; at 32760 tokens one launch takes twice
#   as long. The cost model would mix in the loop before Hopper and where tokens are few. By these rows it is wrong
#   about that kernel on the H100, so that mixing first stands there too until something is measured.
# - Plain attention at D = 128: the own kernel takes 0.92 and 0.91 times cuDNN's time at 32760 and 75600 tokens, and
#   1.12, 1.04 and 1.00 times at 4096, 8192 and 16384; at D = 64 and 96, 1.04 and 1.05 times at 16384. cuDNN reaches
#   580 TFLOP/s at 32760 tokens, FLASH 350, EFFICIENT 180. Before Hopper FLASH, which is FlashAttention-2, is what is
#   published as the fastest of torch's.
# - FlashAttention's own packages are no entry before a row shows one right and faster: the third is published at 646
#   TFLOP/s for 8192 tokens on an H100, where cuDNN was measured at 666; the fourth has no row.
TABLE = (
    Choice(9, 128, 32760, LERP_FIRST, (OWN, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)),
    Choice(9, None, 0, LERP_FIRST, (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)),
    Choice(8, None, 0, LERP_FIRST, (SDPBackend.FLASH_ATTENTION, *REST)),
)


def kv_lerp_attention(
    q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`: mixes copies of k and v, unless it mixes in the loop.

    Torch's attention keeps the log-sum-exp to itself: it comes from the kernel of this package for sm_90, or from the
    one that mixes in its loop.
    """
    own = own_kernel(q, k, scale) if return_lse else None
    if choice(q, k).way == IN_LOOP or (return_lse and own is None):
        return attend_in_loop(q, k, v, *args, scale=scale, return_lse=return_lse, **options)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    if own is not None:
        kv_lerp_pair_(k, v, *args, **options)
        return own(q, k, v, scale=scale, return_lse=True)
    return kv_lerp_attention_(q, k, v, *args, scale=scale, **options), q.new_empty(0, dtype=torch.float32)


def kv_lerp_attention_(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, **options: Any) -> Tensor:
    """See `kvlock_kernels.kv_lerp_attention_`."""
    ways = {LERP_FIRST: lerp_then_attend_, IN_LOOP: in_loop, ONE_LAUNCH: attend_persistently_}
    return ways[choice(q, k).way](q, k, v, *args, scale=scale, **options)


def in_loop(*args: Tensor, **options: Any) -> Tensor:
    return attend_in_loop(*args, **options)[0]


def lerp_then_attend_(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, **options: Any) -> Tensor:
    """Mixes k and v in place, then attends to them."""
    kv_lerp_pair_(k, v, *args, **options)
    return plain_attention(q, k, v, scale)


def choice(q: Tensor, k: Tensor) -> Choice:
    """The line for q [B, M, H, D] and k [B, N, H, D]; GPUs newer than all lines count as the newest."""
    capability = min(torch.cuda.get_device_capability(k.device)[0], max(line.capability for line in TABLE))
    dim, tokens = k.shape[3], min(q.shape[1], k.shape[1])
    fits = lambda line: line.capability == capability and line.dim in (None, dim) and tokens >= line.tokens
    return next(filter(fits, TABLE))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of q [B, M, H, D] to k, v [B, N, H, D]."""
    plain = choice(q, k).plain
    if plain[0] == OWN and (own := own_kernel(q, k, scale)) is not None:
        return own(q, k, v, scale=scale, return_lse=False)[0]
    wider = torch.promote_types(q.dtype, k.dtype)
    queries, keys, values = (x.to(wider).transpose(1, 2) for x in (q, k, v))
    if scale < 0:  # the kernels take the maximum before they multiply
        queries, scale = -queries, -scale
    with sdpa_kernel([backend for backend in plain if isinstance(backend, SDPBackend)], set_priority=True):
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
    return out.to(q.dtype).contiguous()


def own_kernel(q: Tensor, k: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel of this package for sm_90, where it serves."""
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return None
    try:
        from kvlock_kernels._triton import hopper
    except ImportError:  # it is written in Gluon, whose names still move from one Triton to the next
        return None
    return None if hopper.why_not(q, k, scale) else hopper.attention
