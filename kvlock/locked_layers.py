"""What the layers of one session share: whether they record source rows, lerp them in or rest; and what they record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock.places import Shelf
from kvlock.step_file import Piece
from kvlock.store import Rows, Store

OFF, RECORD, LERP, BATCH = range(4)
BEFORE_ROPE, AFTER_ROPE = "before RoPE", "after RoPE"


class LayerKey(NamedTuple):
    """Which tensor of which layer is watched."""

    stack: str  # name of the transformer's block list
    block: int
    tensor: str  # "k", "v", or "kv" for both
    expert: int = 0  # number of the transformer in its pipeline
    heads: int = 1  # of its attention

    @property
    def name(self) -> str:
        """What messages call the layer."""
        return f"{self.stack}[{self.block}]"


class Recorded(NamedTuple):
    """Source rows of one tensor of a layer, and where in its attention they were taken."""

    rows: Rows
    point: str  # BEFORE_ROPE or AFTER_ROPE


def check_point(key: LayerKey, taken: str, wanted: str) -> None:
    """Wants rows that were taken at the point where the layer mixes them in.

    Raises:
        ValueError: they were taken at the other one, where a key has other numbers.
    """
    if taken != wanted:
        raise ValueError(
            f"{key.name} has source rows recorded {taken} and mixes {wanted}; "
            "wanted rows recorded by the same kernel"
        )


class LockState:
    """What all layers of a session read. A new `mode` is one more graph for a compiled block, never one a layer."""

    def __init__(
        self,
        index: Tensor,
        num_tokens: int,
        *,
        full: bool = False,
        store: Store | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.mode = OFF
        self.store = Store() if store is None else store
        self.shelf = shelf  # where rows wait that do not stay with their layers
        self.full = full  # whether every ratio of the session is 1, so that no layer has to look
        self.index = index  # [rows] int32, background rows of the token axis
        self.num_tokens = num_tokens
        self.source_row = torch.full((num_tokens,), -1, dtype=torch.int32, device=index.device)  # the inverse of index
        self.source_row[index.long()] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        self.foreground = (self.source_row < 0).nonzero().flatten().int()  # [N - rows] int32, the other tokens
        self.order = torch.cat([index, self.foreground])  # [N] int32, all tokens, background first
        self.ratio = torch.empty(0)  # [B] fp32, refilled in place between steps
        self.source_batch = 1  # samples at the front of a batch in BATCH mode

    @property
    def rows(self) -> int:
        """How many tokens are background; a size, because a compiled block has one graph for each value of a number."""
        return self.index.shape[0]


class Holder:
    """What records or lerps in one layer."""

    def __init__(self, key: LayerKey, shared: LockState) -> None:
        self.key = key
        self.shared = shared
        self.reached = False  # whether it has, since the last switch
        self.k_source: Recorded | None = None  # of rows that stay with the layer
        self.v_source: Recorded | None = None

    def keep(self, tensor: str, rows: Rows, point: str) -> None:
        """Keep rows of "k" or "v", taken at `point`: here, or on the shelf."""
        shelf = self.shared.shelf
        if shelf is not None:
            shelf.put(self.piece(tensor), rows, point)
        elif tensor == "k":
            self.k_source = Recorded(rows, point)
        else:
            self.v_source = Recorded(rows, point)

    def source_rows(self, tensor: str, point: str) -> Rows:
        """The rows of "k" or "v", for a layer that mixes at `point`.

        Raises:
            ValueError: there are none, or they were taken at the other point.
        """
        shelf = self.shared.shelf
        if shelf is not None:
            piece = self.piece(tensor)
            check_point(self.key, shelf.points.get(piece, point), point)  # attach has compared a recording's
            return shelf.get(piece)
        kept = self.k_source if tensor == "k" else self.v_source
        if kept is None:
            raise ValueError(f"{self.name} has no source rows for {tensor}; record them first")
        check_point(self.key, kept.point, point)
        return kept.rows

    def piece(self, tensor: str) -> Piece:
        """What the shelf calls its "k" or "v"."""
        return Piece(self.key.expert, self.key.stack, self.key.block, tensor)

    @property
    def name(self) -> str:
        """For messages: compiled code that read the key would be guarded on its number, a graph for each layer."""
        return self.key.name

    def require_tokens(self, tokens: int) -> None:
        """Wants the number of tokens that the mask has.

        Raises:
            ValueError: there are more or fewer.
        """
        wanted = self.shared.num_tokens
        if tokens != wanted:
            raise ValueError(f"{self.name} has {tokens} tokens, not {wanted}; the mask was made for another size")

    def replaced_by(self, processor: Any) -> ValueError:
        """The error to raise where another processor stands in the layer than at attach."""
        return ValueError(
            f"{self.name} has had its processor replaced by {type(processor).__name__} since attach; "
            "leave the block first"
        )


class LockedLayers(ABC):
    """The layers of a session, whatever it is that records and lerps in them; a session switches them together.

    Attributes:
        point: where in the attention they do so, BEFORE_ROPE or AFTER_ROPE.
    """

    point: str

    def __init__(self, shared: LockState) -> None:
        self.shared = shared

    def require_all(self, expert: int) -> None:
        """After a forward of transformer number `expert` that recorded or lerped: each of its layers has.

        Raises:
            ValueError: names the first layer that has not, which would go on without the lock.
        """
        for holder in self.holders():
            if holder.key.expert == expert and not holder.reached:
                raise ValueError(
                    f"{holder.name} ran past the lock on its {' and '.join(holder.key.tensor)}: its attention does "
                    "not call the module that gives it; wanted diffusers' own processor and projections"
                )

    def to(self, device: torch.device) -> None:
        if self.shared.shelf is not None:
            self.shared.shelf.serve(device, {holder.piece("k").layer for holder in self.holders()})
        self.shared.index = self.shared.index.to(device)
        self.shared.source_row = self.shared.source_row.to(device)
        self.shared.foreground = self.shared.foreground.to(device)
        self.shared.order = self.shared.order.to(device)

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
        for holder in self.holders():
            holder.reached = False

    @abstractmethod
    def holders(self) -> Iterable[Holder]:
        """One or more for each layer."""

    @abstractmethod
    def install(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        """Take hold of these parts of a transformer, whichever this kind of layer wants.

        Raises:
            ValueError: a part is held by a session already, or does not fit.
        """

    @abstractmethod
    def require_same(self, parts: Iterable[tuple[LayerKey, Any]]) -> None:
        """These are the very parts that were installed.

        Raises:
            ValueError: names one that has been replaced since.
        """

    @abstractmethod
    def remove(self) -> None:
        """Leave the transformer as it was."""

    def turn_to(self, step: int) -> None:
        """The rows that are recorded or mixed from now on are those of step number `step` of the scheduler's table."""
        if self.shared.shelf is not None:
            self.shared.shelf.turn_to(step)

    def seal(self) -> None:
        """All layers have recorded their rows of this step."""
        if self.shared.shelf is not None:
            self.shared.shelf.seal()

    def free(self) -> None:
        """Forget the recorded rows."""
        if self.shared.shelf is not None:
            self.shared.shelf.clear()
        for holder in self.holders():
            holder.k_source = holder.v_source = None

    @property
    def source_bytes(self) -> int:
        """Bytes held for the recorded rows."""
        if self.shared.shelf is not None:
            return self.shared.shelf.bytes_kept
        kept = [source for holder in self.holders() for source in (holder.k_source, holder.v_source)]
        return sum(source.rows.bytes_kept for source in kept if source is not None)


def require_same(parts: Iterable[tuple[LayerKey, Any]], installed: Iterable[Any]) -> None:
    """What `LockedLayers.require_same` says, of modules in the order of their installation."""
    for (key, found), module in zip(parts, installed, strict=True):
        if found is not module:
            raise ValueError(
                f"{key.name} has had the module that gives {' and '.join(key.tensor)} replaced by "
                f"{type(found).__name__} since attach; leave the block, change the model, then attach"
            )
