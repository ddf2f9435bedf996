"""How source rows are kept from the source's forward to the edit's: in which dtype, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_kernels import pack_kv, unpack_kv

DTYPES = {"model": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
PLACES = ("device", "host", "disk")  # each with more room than the one before it
LAYERS_ON_DEVICE = 2  # whose rows are there at a time from the other places: the one that computes and the next
LAYERS_AT_ONCE = 2  # that are written to a disk; the host holds as many, and one whose copies are under way


class Rows(NamedTuple):
    """Source rows of one tensor of a layer."""

    data: Tensor  # [Bs, rows, C] or [Bs, rows, H, D]; [Bs, rows, H, D] where it is 8-bit
    scale: Tensor | None = None  # [Bs, rows, H] fp32, with 8-bit data
    mean: Tensor | None = None  # [Bs, H, D] fp32, what is to be added back

    @property
    def bytes_kept(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Every tensor that there is, changed."""
        scale, mean = (None if part is None else change(part) for part in (self.scale, self.mean))
        return Rows(change(self.data), scale, mean)

    def options(self, name: str) -> dict[str, Any]:
        """Scale and mean as the operators call them: ``{name}_scale`` and ``{name}_mean``."""
        return {f"{name}_scale": self.scale, f"{name}_mean": self.mean}

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The rows in a floating dtype."""
        return self.data if self.scale is None else unpack_kv(self.data, self.scale, mean=self.mean, dtype=dtype)


@dataclass(frozen=True)
class Store:
    """How source rows are stored: those of the background, and no others.

    With one exception: on the device, in the dtype of the model, a full lock by ``kernel="backend"`` keeps room for the
    foreground's rows behind them, so that the edit's own join them without a copy of all.

    Attributes:
        dtype: ``"model"`` as the model gives them; ``"fp8"`` (e4m3) or ``"int8"`` in one byte a value, with a scale for
            each token and head (`kvlock_kernels.pack_kv`).
        k_mean: whether 8-bit keys are stored relative to their mean over the rows of the layer, which is kept too. Keys
            of one head share a large component that attention does not see; what is left has smaller steps. None is
            yes, which measured best (``benchmarks/README.md``), but for ``kernel="fused"``, which has no place for it.
        place: where the rows of a step wait: on the ``"device"``, in ``"host"`` memory (pinned, where the device is a
            CUDA one) or on ``"disk"``. With the latter two, rows of two layers are on the device at a time: those of
            the layer that computes, and of the next, which are read from the disk first and come meanwhile. While the
            source computes, rows of at most two layers wait there to be copied away. Rows on their way from a CUDA
            device to a disk pass through pinned memory for three layers, and on their way back through memory for two;
            torch takes a power of two of bytes for each tensor of it. What a step takes on the host or the disk serves
            the next, and is given back when the session ends. Compiled transformers need the device. Traces of
            `torch.profiler` have names for the host's part:
            ``kvlock::read_rows``, ``write_rows``, ``close_file``, ``pin_memory``, ``wait_for_write``, ``wait_for_copy``
            and, of a recording, ``wait_for_checksum``.
        folder: where a ``"disk"`` store makes its temporary files; None is the system's own place for such files, which
            may be memory. A process that is killed leaves a folder ``.kvlock-*`` there.

    Raises:
        ValueError: a setting is not known, or does not go with the others.
    """

    dtype: str = "model"
    k_mean: bool | None = None
    place: str = "device"
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; wanted one of {', '.join(map(repr, DTYPES))}")
        if self.k_mean is not None and not isinstance(self.k_mean, bool):
            raise ValueError(f"k_mean={self.k_mean!r} is not allowed; wanted True, False or None")
        if self.k_mean and not self.packs:
            raise ValueError("k_mean=True has no effect with dtype='model'; wanted dtype='fp8' or 'int8'")
        if not isinstance(self.place, str) or self.place not in PLACES:
            raise ValueError(f"place={self.place!r} is not known; wanted one of {', '.join(map(repr, PLACES))}")
        if self.folder is not None and not isinstance(self.folder, str | Path):
            raise ValueError(f"folder={self.folder!r} is not allowed; wanted a path or None")
        if self.folder == "":  # which would be the current folder, and is a variable that was not set
            raise ValueError("folder='' names nothing; wanted a path or None")
        if self.folder is not None and self.place != "disk":
            raise ValueError(f"folder={str(self.folder)!r} has no effect with place={self.place!r}; leave it out")

    @property
    def packs(self) -> bool:
        """Whether rows are stored in 8 bits."""
        return DTYPES[self.dtype] is not None

    @property
    def takes_mean(self) -> bool:
        """Whether keys are stored relative to their mean."""
        return self.packs if self.k_mean is None else self.k_mean

    def storage_dtype(self, model: torch.dtype) -> torch.dtype:
        """The dtype of stored rows of a model in dtype `model`."""
        return DTYPES[self.dtype] or model

    def keep(self, x: Tensor, index: Tensor, heads: int, *, keys: bool) -> Rows:
        """Rows `index` [rows] int32 of x [Bs, N, C] or [Bs, N, H, D]; `keys` says whether they are keys."""
        if not self.packs:
            return Rows(x.index_select(1, index))
        x = x if x.ndim == 4 else x.view(*x.shape[:2], heads, -1)
        mean = None
        if self.takes_mean and keys and len(index):
            mean = x.index_select(1, index).mean(1, dtype=torch.float32)
        data, scale = pack_kv(x, index, self.storage_dtype(x.dtype), mean=mean)
        return Rows(data, scale, mean)

    def bytes_of(self, rows: int, heads: int, head_dim: int, bytes_per_value: int) -> int:
        """Bytes that K and V of one layer take, of `rows` tokens in a model of `bytes_per_value` a value."""
        if not self.packs:
            return 2 * rows * heads * head_dim * bytes_per_value
        return 2 * rows * heads * (head_dim + 4) + (4 * heads * head_dim if self.takes_mean and rows else 0)
