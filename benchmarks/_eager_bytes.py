"""The bytes that eager PyTorch moves for a call, counted step by step without data or GPU."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._case import Case, Provider

READS_ITS_RESULT = {"index_select", "index", "gather"}  # of its first argument as much as comes out
WRITES_ITS_LAST = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}  # argument into the first, no more
WRITES_ONLY = {"copy_", "fill_", "zero_"}  # the first argument is not read
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Counting(TorchDispatchMode):
    """Inside, each operator adds what it reads and writes; views are free."""

    bytes = 0
    steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE or name == "_unsafe_view":
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
        self.steps += 1
        return result


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
