"""The bytes that eager PyTorch moves on a GPU, and what it multiplies, counted step by step without data or GPU."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._case import Case, Provider

READS_ITS_RESULT = {"index_select", "index", "gather"}  # of its first argument as much as comes out
WRITES_ITS_LAST = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}  # argument into the first, no more
WRITES_ONLY = {"copy_", "fill_", "zero_"}  # the first argument is not read
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}  # bound by their FLOP


class Counting:
    """Inside, each operator adds what it reads and writes, or the FLOP of a product of matrices; views are free."""

    def __init__(self) -> None:
        self._whole, self._steps = WholeSteps(), Steps()
        self._products = FlopCounterMode(display=False)

    @property
    def bytes(self) -> int:
        return self._steps.bytes + self._whole.bytes

    @property
    def flop(self) -> int:
        return self._products.get_total_flops() + self._whole.flop

    def __enter__(self) -> "Counting":
        with contextlib.ExitStack() as modes:
            for mode in (self._whole, self._products, self._steps):
                modes.enter_context(mode)
            self._modes = modes.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()


class Steps(TorchDispatchMode):
    """Counts the bytes of every step but products of matrices."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE or name == "_unsafe_view" or name in PRODUCTS:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in READS_ITS_RESULT:
            read = tensors[1:] + written
        elif name in WRITES_ITS_LAST:
            read, written = tensors[1:], tensors[-1:]
        elif name in WRITES_ONLY:
            read = tensors[1:]
        else:
            read = tensors
        self.bytes += sum(map(stored, read)) + sum(map(stored, written))
        return result


class WholeSteps(TorchFunctionMode):
    """Counts what a GPU runs as one kernel although it falls apart on tensors without data, and computes none of it."""

    bytes = 0  # of RMS norms
    flop = 0  # of attention: two products of q [..., M, D] with k and v [..., N, D]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self.flop += 4 * q.numel() * k.shape[-2]
            return torch.empty_like(q)
        if func is F.rms_norm:
            self.bytes += 2 * stored(args[0])
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


def stored(x: Tensor) -> int:
    """Bytes of x in memory: what is broadcast is stored once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def eager_bytes(case: Case, provider: Provider) -> int:
    """Of one call, on tensors that have shapes only."""
    inputs = provider.prepare(case.make(case.shape, "meta", 0))
    with Counting() as counting:
        provider.run(inputs)
    return counting.bytes
