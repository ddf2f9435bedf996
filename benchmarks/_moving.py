"""Counts the bytes of source rows that an edit sends to another place and fetches from there."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from kvlock.places import Shelf
from kvlock.store import Rows
from kvlock.transit import Courier


class Moved:
    """Bytes so far."""

    bytes = 0


@contextlib.contextmanager
def counted() -> Iterator[Moved]:
    """Inside, whatever is put on a shelf, or sent from one to the device, is counted."""
    moved, put, send = Moved(), Shelf.put, Courier._send

    def counted_put(shelf: Shelf, piece: Any, rows: Rows, *more: Any) -> None:
        moved.bytes += rows.bytes_kept
        put(shelf, piece, rows, *more)

    def counted_send(courier: Courier, layer: Any, source: dict[str, Rows], kept: Any) -> None:
        moved.bytes += sum(rows.bytes_kept for rows in source.values())
        send(courier, layer, source, kept)

    with mock.patch.object(Shelf, "put", counted_put), mock.patch.object(Courier, "_send", counted_send):
        yield moved
