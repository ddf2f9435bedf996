"""kv_lerp_attention and kv_lerp_attention_: source rows mixed in first, then the fastest plain attention there is."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlock_kernels._triton.in_loop import attend_in_loop
from kvlock_kernels._triton.lerp import kv_lerp_pair_

# The choice, from one H100 at D = 128 (benchmarks/results):
# - Mixing first, then plain attention, takes 1.01 times the time of plain attention at 32760 tokens and 1.11 at 4096.
# - Mixing in the loop of the attention takes 4 (rows in bf16) to 11 times (int8) as long as that at 4096 tokens.
# - One launch that mixes under the attention takes twice as long at 32760 tokens, 3.6 times at 4096.

# Torch's own attention, the fastest first, by the major number of the compute capability. At 32760 tokens cuDNN reaches
# 580 TFLOP/s, FLASH 350 and EFFICIENT 180; before Hopper the FLASH backend is FlashAttention-2 itself, which was not
# measured there. flash-attn's own packages were not either. The rest is for what these do not serve, such as fp32.
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
PLAIN = {8: (SDPBackend.FLASH_ATTENTION, *REST), 9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)}

# The fewest queries and keys from which the kernel of this package for sm_90 takes less time than those, by D: it takes
# 1.12, 1.04, 1.00, 0.92 and 0.91 times cuDNN's time at 4096, 8192, 16384, 32760 and 75600 tokens and D = 128, 1.04 and
# 1.05 times at 16384 and D = 64 and 96.
OWN = {128: 32760}


def kv_lerp_attention(
    q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`: mixes copies of k and v.

    Torch's attention keeps the log-sum-exp to itself: it comes from the kernel of this package for sm_90, or from the
    one that mixes in its loop.
    """
    if return_lse and own_kernel(q, k, scale) is None:
        return attend_in_loop(q, k, v, *args, scale=scale, return_lse=True, **options)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    kv_lerp_pair_(k, v, *args, **options)
    return plain_attention(q, k, v, scale, return_lse=return_lse)


def lerp_then_attend_(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, **options: Any) -> Tensor:
    """See `kvlock_kernels.kv_lerp_attention_`: mixes k and v in place."""
    kv_lerp_pair_(k, v, *args, **options)
    return plain_attention(q, k, v, scale)[0]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, return_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, M, H, D] to k, v [B, N, H, D], and its log-sum-exp, which only the own kernel gives."""
    pays = min(q.shape[1], k.shape[1]) >= OWN.get(k.shape[3], math.inf)
    if (return_lse or pays) and (own := own_kernel(q, k, scale)) is not None:
        return own(q, k, v, scale=scale, return_lse=return_lse)
    wider = torch.promote_types(q.dtype, k.dtype)
    queries, keys, values = (x.to(wider).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel([*PLAIN[generation(k)]], set_priority=True):
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2)
    return out.to(q.dtype).contiguous(), q.new_empty(0, dtype=torch.float32)


def own_kernel(q: Tensor, k: Tensor, scale: float) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The kernel of this package for sm_90, where it serves."""
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return None
    try:
        from kvlock_kernels._triton import hopper
    except ImportError:  # it is written in Gluon, whose names still move from one Triton to the next
        return None
    return None if hopper.why_not(q, k, scale) else hopper.attention


def generation(x: Tensor) -> int:
    """The major number of the compute capability of x's GPU; GPUs newer than all known ones count as the newest."""
    return min(torch.cuda.get_device_capability(x.device)[0], max(PLAIN))
