"""A clock in place of a CUDA device: what the host does for it is real, and what it does itself only takes its time."""

import contextlib
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from kvlock import transit
from kvlock.store import Rows

ENDS = 2  # of the values of a tensor, at its beginning and at its end: all that copies to the device and from it move


class Event:
    """Over when the clock says so."""

    def __init__(self, due: float) -> None:
        self.due = due

    def synchronize(self) -> None:
        time.sleep(max(0, self.due - time.perf_counter()))


class Stream:
    """A layer takes its seconds, and a copy none but what it waits for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._free = 0.0

    def computes(self, seconds: float) -> None:
        """Queue a layer; the host goes on."""
        self._free = max(self._free, time.perf_counter()) + seconds

    def record_event(self) -> Event:
        return Event(self._free)

    def wait_event(self, event: Event) -> None:
        self._free = max(self._free, event.due)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Memory:
    """Gives the memory of tensors that are no more to the next ones of their size, as torch does on a GPU."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        free = self._free[tensor.shape, tensor.dtype]
        # Numbers, since reading memory that nobody has written is faster than reading what has.
        memory = free.pop() if free else torch.empty_like(tensor).random_(256)
        given = memory.detach()
        weakref.finalize(given, free.append, memory)
        return given


def ends(tensor: torch.Tensor) -> torch.Tensor:
    """The values that are copied, [2, ENDS] of [1, n]."""
    return tensor[0].as_strided((2, ENDS), (tensor.shape[1] - ENDS, 1))


@contextlib.contextmanager
def clocked() -> Iterator[Stream]:
    """Inside, a clock is the CUDA device, and its memory is the host's; gives the stream that computes.

    Rows are `Rows` of bytes [1, n] there. The host does not make the copies that a GPU makes itself: of each tensor
    only the `ends` arrive.
    """
    computing, memory, real = Stream(), Memory(), transit.copy

    def room_for(rows: Rows, before: Rows | None, device: Any, *, pinned: bool = False) -> Rows:
        return before if before is not None and transit.fits(rows, before) else rows.each(memory.empty_like)

    def copy(rows: Rows, room: Rows, *, non_blocking: bool) -> None:
        if non_blocking:
            ends(room.data).copy_(ends(rows.data))
        else:
            real(rows, room, non_blocking=False)

    with (
        mock.patch.object(torch.cuda, "Stream", lambda device: Stream()),
        mock.patch.object(torch.cuda, "current_stream", lambda device: computing),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(transit, "room_for", room_for),
        mock.patch.object(transit, "copy", copy),
    ):
        yield computing
