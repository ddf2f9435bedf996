"""Several evaluations of one formula by plain torch in one dtype: what shows the error that torch has in it.

One sum, or one number, may be all but exact by luck. Each evaluation here has the same exact value, and no step of it
rounds to fewer bits than torch's in that dtype: it only adds up in another order, or rounds at other places.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ENOUGH = 64  # errors whose largest is seldom lucky
ORDERS = 32  # of a sum, whose largest error is seldom lucky either


def draws(numbers: int) -> range:
    """As many draws, of `numbers` errors each, as give ENOUGH."""
    return range(-(-ENOUGH // numbers))


def orders(size: int, count: int = ORDERS) -> list[Tensor]:
    """Orders in which torch may add up `size` terms: as they come, and seeded permutations."""
    device = torch.get_default_device()
    seeded = (torch.Generator().manual_seed(seed) for seed in range(1, count))
    shuffled = [torch.randperm(size, generator=generator, device="cpu").to(device) for generator in seeded]
    return [torch.arange(size), *shuffled]


def attentions(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[Tensor]:
    """softmax(scale * q k^T) v [B, M, H, D] step by step, with channels and keys in several orders, and torch's own.

    The order of the sums decides which of the many outputs is furthest off. Torch's own attention divides after the
    second product, as kernels do, and is what serves fp32 on a GPU.
    """
    yield F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
    for channels, keys in zip(orders(q.shape[3]), orders(k.shape[1]), strict=True):
        products = torch.einsum("bmhd,bnhd->bhmn", q[..., channels], k[:, keys][..., channels])
        yield torch.einsum("bhmn,bnhd->bmhd", (scale * products).softmax(-1), v[:, keys])


def log_sum_exps(q: Tensor, k: Tensor, scale: float) -> list[Tensor]:
    """The log-sum-exp [B, H, M] of the scores in fp32, with channels and keys in several orders.

    Products are added up by torch, which may keep several sums, and in a single one, whose error grows faster and which
    kernels have on a GPU. The logarithm is torch's, or turned from base 2 as in the kernels, which costs two roundings.
    """
    q, k = q.float(), k.float()
    found = []
    for channels, keys in zip(orders(q.shape[3]), orders(k.shape[1]), strict=True):
        factors = q[..., channels], k[:, keys][..., channels]
        for products in (torch.einsum("bmhd,bnhd->bhmn", *factors), added_one_by_one(*factors)):
            found += [torch.logsumexp(scale * products, -1), log_sum_exp_in_base_2(products, scale)]
    return found


def added_one_by_one(q: Tensor, k: Tensor) -> Tensor:
    """q k^T [B, H, M, N] in one sum over the channels."""
    q, k = q.permute(3, 0, 2, 1)[..., None], k.permute(3, 0, 2, 1)[..., None, :]
    total = q[0] * k[0]
    for one, other in zip(q[1:], k[1:], strict=True):
        total += one * other
    return total


def log_sum_exp_in_base_2(products: Tensor, scale: float) -> Tensor:
    scores = products * (scale * math.log2(math.e))
    highest = scores.amax(-1, keepdim=True)
    return (highest.squeeze(-1) + (scores - highest).exp2().sum(-1).log2()) * math.log(2)
