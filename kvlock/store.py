"""How source rows are kept from the source's forward to the edit's: the dtype they are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_kernels import pack_kv, unpack_kv

DTYPES = {"model": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


class Rows(NamedTuple):
    """Source rows of one tensor of a layer."""

    data: Tensor  # [Bs, rows, C] or [Bs, rows, H, D]; [Bs, rows, H, D] where it is 8-bit
    scale: Tensor | None = None  # [Bs, rows, H] fp32, with 8-bit data
    mean: Tensor | None = None  # [Bs, H, D] fp32, what is to be added back

    @property
    def bytes_kept(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def options(self, name: str) -> dict[str, Any]:
        """Scale and mean as the operators call them: ``{name}_scale`` and ``{name}_mean``."""
        return {f"{name}_scale": self.scale, f"{name}_mean": self.mean}

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The rows in a floating dtype."""
        return self.data if self.scale is None else unpack_kv(self.data, self.scale, mean=self.mean, dtype=dtype)


@dataclass(frozen=True)
class Store:
    """How source rows are stored.

    Attributes:
        dtype: ``"model"`` as the model gives them; ``"fp8"`` (e4m3) or ``"int8"`` in one byte a value, with a scale for
            each token and head (`kvlock_kernels.pack_kv`).
        k_mean: whether 8-bit keys are stored relative to their mean over the rows of the layer, which is kept too. Keys
            of one head share a large component that attention does not see; what is left has smaller steps.

    Raises:
        ValueError: a setting is not known, or does not go with the other.
    """

    dtype: str = "model"
    k_mean: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; wanted one of {', '.join(map(repr, DTYPES))}")
        if not isinstance(self.k_mean, bool):
            raise ValueError(f"k_mean={self.k_mean!r} is not allowed; wanted True or False")
        if self.k_mean and not self.packs:
            raise ValueError("k_mean=True has no effect with dtype='model'; wanted dtype='fp8' or 'int8'")

    @property
    def packs(self) -> bool:
        """Whether rows are stored in 8 bits."""
        return DTYPES[self.dtype] is not None

    def storage_dtype(self, model: torch.dtype) -> torch.dtype:
        """The dtype of stored rows of a model in dtype `model`."""
        return DTYPES[self.dtype] or model

    def keep(self, x: Tensor, index: Tensor, heads: int, *, keys: bool) -> Rows:
        """Rows `index` [rows] int32 of x [Bs, N, C] or [Bs, N, H, D]; `keys` says whether they are keys."""
        if not self.packs:
            return Rows(x.index_select(1, index))
        x = x if x.ndim == 4 else x.view(*x.shape[:2], heads, -1)
        mean = x.index_select(1, index).float().mean(1) if self.k_mean and keys and len(index) else None
        data, scale = pack_kv(x, index, self.storage_dtype(x.dtype), mean=mean)
        return Rows(data, scale, mean)

    def bytes_of(self, rows: int, heads: int, head_dim: int, bytes_per_value: int) -> int:
        """Bytes that K and V of one layer take, of `rows` tokens in a model of `bytes_per_value` a value."""
        if not self.packs:
            return 2 * rows * heads * head_dim * bytes_per_value
        return 2 * rows * heads * (head_dim + 4) + (4 * heads * head_dim if self.k_mean and rows else 0)
