"""kv_lerp_attention and kv_lerp_attention_: source rows mixed in first, then the fastest plain attention there is."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlock_kernels._triton import hopper
from kvlock_kernels._triton.attention import attend_in_loop
from kvlock_kernels._triton.lerp import kv_lerp_pair_

# Torch's own attention, the fastest first, by the major number of the compute capability. On an H100, at D = 128 and
# 32760 tokens, cuDNN reaches 580 TFLOP/s, FLASH 350 and EFFICIENT 180; before Hopper the FLASH backend is
# FlashAttention-2 itself, not measured here. The rest is for what these do not serve, such as fp32.
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
PLAIN = {8: (SDPBackend.FLASH_ATTENTION, *REST), 9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)}

# The fewest keys from which the kernel of this package for sm_90 takes less time than those, by D. On an H100 it takes
# 1.11, 1.04, 1.00, 0.91 and 0.93 times cuDNN's time at 4096, 8192, 16384, 32760 and 75600 keys and D = 128; at D = 64
# and 96 it takes 1.04 times at 16384.
OWN = {128: 32760}


def kv_lerp_attention(
    q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`: mixes copies of k and v.

    Mixing in the loop of the attention needs no copy and still loses: on an H100 it takes 4.3 times as long as this at
    4096 tokens with rows in bf16, 10 times with int8. It serves who asks for the log-sum-exp, which torch's attention
    keeps to itself, where the kernel of this package for sm_90 does not serve.
    """
    if return_lse and hopper.why_not(q, k, scale):
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
    pays = k.shape[1] >= OWN.get(k.shape[3], math.inf)
    if return_lse or (pays and hopper.why_not(q, k, scale) is None):
        return hopper.attention(q, k, v, scale=scale, return_lse=return_lse)
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    with sdpa_kernel([*PLAIN[generation(k)]], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
    return out, out.new_empty(0, dtype=torch.float32)


def generation(x: Tensor) -> int:
    """The major number of the compute capability of x's GPU; GPUs newer than all known ones count as the newest."""
    return min(torch.cuda.get_device_capability(x.device)[0], max(PLAIN))
