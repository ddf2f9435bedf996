"""What the layers of one session share: whether they record source rows, lerp them in or rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

OFF, RECORD, LERP, BATCH = range(4)


class LayerKey(NamedTuple):
    """Which tensor of which layer is watched."""

    stack: str  # name of the transformer's block list
    block: int
    tensor: str  # "k", "v", or "kv" for both


class LockState:
    """What all layers of a session read. A new `mode` is one more graph for a compiled block, never one a layer."""

    def __init__(self, index: Tensor, num_tokens: int) -> None:
        self.mode = OFF
        self.index = index  # [rows] int32, background rows of the token axis
        self.rows = len(index)
        self.num_tokens = num_tokens
        self.source_row = torch.full((num_tokens,), -1, dtype=torch.int32, device=index.device)  # the inverse of index
        self.source_row[index.long()] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        self.ratio = torch.empty(0)  # [B] fp32, refilled in place between steps
        self.source_batch = 1  # samples at the front of a batch in BATCH mode


class LockedLayers(ABC):
    """The layers of a session, whatever it is that records and lerps in them; a session switches them together."""

    def __init__(self, shared: LockState) -> None:
        self.shared = shared

    def to(self, device: torch.device) -> None:
        self.shared.index = self.shared.index.to(device)
        self.shared.source_row = self.shared.source_row.to(device)

    def off(self) -> None:
        self._switch(OFF)

    def record(self) -> None:
        self._switch(RECORD)

    def lerp(self, ratio: Tensor) -> None:
        self._switch(LERP)
        self.shared.ratio = ratio

    def lerp_batch(self, ratio: Tensor, source_batch: int) -> None:
        self._switch(BATCH)
        self.shared.ratio, self.shared.source_batch = ratio, source_batch

    def _switch(self, mode: int) -> None:
        self.shared.mode = mode

    @abstractmethod
    def install(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        """Take hold of these parts of a transformer, whichever this kind of layer wants.

        Raises:
            ValueError: a part is held by a session already, or does not fit.
        """

    @abstractmethod
    def remove(self) -> None:
        """Leave the transformer as it was."""

    @abstractmethod
    def free(self) -> None:
        """Forget the recorded rows."""

    @property
    @abstractmethod
    def source_bytes(self) -> int:
        """Bytes of the recorded rows."""
