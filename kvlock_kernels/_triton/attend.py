"""kv_lerp_attention and kv_lerp_attention_: which way a call goes, and the way that lerps first and attends then."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlock_kernels._triton.attention import MAX_HEAD_DIM, attend_in_loop
from kvlock_kernels._triton.lerp import kv_lerp_pair_

# Torch's own attention, the fastest first, by the major number of the compute capability. On an H200 cuDNN's published
# rate is 693 TFLOP/s at 32k tokens and FlashAttention-3's on an H100 648; before Hopper the FLASH backend is
# FlashAttention-2 itself. The rest is for what these do not serve, such as fp32.
REST = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
PLAIN = {8: (SDPBackend.FLASH_ATTENTION, *REST), 9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST)}

# The most keys for which a call that must not touch k and v mixes in the loop of the attention instead of copying them,
# by the same number. Not measured yet. By the cost model the copies and the lerp of 4096 tokens take about a tenth of
# the attention to them, less the more tokens there are, whereas mixing in the loop makes it more than half as long
# again on Hopper, whose products read operands from shared memory, and less so before.
IN_LOOP = {8: 1024, 9: 0}


def kv_lerp_attention(
    q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, return_lse: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """See `kvlock_kernels.kv_lerp_attention`."""
    fits = k.shape[3] <= MAX_HEAD_DIM and k.dtype == q.dtype and scale > 0
    # Torch's attention keeps the log-sum-exp to itself.
    if return_lse or (fits and k.shape[1] <= IN_LOOP[generation(k)]):
        return attend_in_loop(q, k, v, *args, scale=scale, return_lse=return_lse, **options)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    return lerp_then_attend_(q, k, v, *args, scale=scale, **options), q.new_empty(0, dtype=torch.float32)


def lerp_then_attend_(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, scale: float, **options: Any) -> Tensor:
    """See `kvlock_kernels.kv_lerp_attention_`: mixes k and v in place."""
    kv_lerp_pair_(k, v, *args, **options)
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    with sdpa_kernel([*PLAIN[generation(k)]], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def generation(x: Tensor) -> int:
    """The major number of the compute capability of x's GPU; GPUs newer than all known ones count as the newest."""
    return min(torch.cuda.get_device_capability(x.device)[0], max(PLAIN))
