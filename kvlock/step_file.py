"""The source rows of one step in a safetensors file, written layer by layer and read through a memory map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.profiler import record_function

from kvlock import write_back
from kvlock.store import Rows

# The header stands in front of the data and is known after it: it gets this room, and blanks fill what it leaves. 48
# layers of K and V in 8 bits, with scales, means and gaps to fill, need less than half of it.
HEADER_BYTES = 2**17
BLOCK_BYTES = 2**22  # that are hashed at a time
ALIGNMENT = 64  # of every tensor, in bytes; the format knows no gaps, so that a tensor of blanks fills each
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32",
         torch.int64: "I64", torch.bool: "BOOL"}  # fmt: skip


class Piece(NamedTuple):
    """Whose rows these are: one tensor of one layer."""

    expert: int  # number of the transformer in its pipeline
    stack: str  # name of its block list
    block: int
    tensor: str  # "k" or "v"

    @property
    def layer(self) -> tuple[int, str, int]:
        return self[:3]

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @classmethod
    def parse(cls, name: str) -> Piece:
        expert, stack, block, tensor = name.split(".")
        return cls(int(expert), stack, int(block), tensor)


class StepWriter:
    """Writes one file, which an error of the system removes again.

    With `over` a file that is there is written over, which spares the system finding memory for a new one; nobody may
    read it meanwhile. Without, there must be none. The system begins to write to the disk at once each piece that ends
    beyond the first `early_from` bytes.

    Raises:
        ValueError: the file cannot be written; the message names it and says why.
    """

    def __init__(self, path: Path, *, over: bool = False, early_from: float = math.inf) -> None:
        self.path = path
        self._early_from = early_from
        self._entries: dict[str, dict] = {}
        self._end = 0  # of the data so far
        self._file: IO[bytes] | None = None
        with self._named_errors():
            self._file = path.open("r+b" if over and path.exists() else "xb")
            self._file.seek(HEADER_BYTES)

    def add(self, piece: Piece, rows: Rows) -> None:
        """Append rows, whatever their device."""
        start = self._end
        for part, tensor in rows._asdict().items():
            if tensor is not None:
                self._append(f"{piece}.{part}", tensor)
        if self._end > max(start, self._early_from):
            with self._named_errors() as file:
                write_back.begin(file.fileno(), HEADER_BYTES + start, self._end - start)

    def close(self) -> None:
        """Write the header: the file is whole."""
        header = json.dumps(self._entries).encode()
        if len(header) > HEADER_BYTES - 8:
            self.discard()
            raise ValueError(f"{self.path} needs a header of {len(header)} bytes; there is room for {HEADER_BYTES - 8}")

        with self._named_errors() as file, record_function("kvlock::close_file"):
            file.seek(0)
            file.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
            file.flush()
            # A longer file that was here is cut, and no other: even where nothing is cut off, Linux waits for a last
            # page that is partly filled to reach the disk, and with it for what is queued before it.
            if os.fstat(file.fileno()).st_size > HEADER_BYTES + self._end:
                file.truncate(HEADER_BYTES + self._end)
            file.close()

    def discard(self) -> None:
        """Remove the file, where there is one of this writer."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk objects once more to what is still buffered
                self._file.close()
            self.path.unlink(missing_ok=True)

    def _append(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in NAMES:
            self.discard()
            wanted = ", ".join(NAMES.values())
            raise ValueError(f"{self.path} cannot hold {name} of {tensor.dtype}; wanted one of {wanted}")
        flat = tensor.detach().cpu().contiguous()
        self._write(name, NAMES[flat.dtype], list(flat.shape), flat.view(-1).view(torch.uint8))
        blanks = -self._end % ALIGNMENT
        if blanks:
            self._write(f"{name}.blanks", "U8", [blanks], torch.zeros(blanks, dtype=torch.uint8))

    def _write(self, name: str, dtype: str, shape: list[int], data: Tensor) -> None:
        start, self._end = self._end, self._end + data.nbytes
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._end]}
        with self._named_errors() as file:
            file.write(data.numpy())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[Any]:
        """Gives the open file; an error of the system removes it, and is raised again with its name."""
        try:
            yield self._file
        except OSError as error:
            self.discard()
            # Its traceback leads to this frame and on to the callers', which in Python 3.12 and 3.13 would hold it, and
            # with it the rows and activations of a forward, until the garbage is collected.
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error.with_traceback(None)


class StepFile:
    """Reads the rows of a step, from one file, or from several, of K and of V.

    Tensors are views of a memory map, and their pages come when they are touched.

    Raises:
        ValueError: a file is not there, is none of ours, or K comes without V; the message names the files.
    """

    def __init__(self, *paths: Path) -> None:
        self._files: dict[Piece, Any] = {}
        self._parts: dict[Piece, list[str]] = {}
        for path in paths:
            with _no_rows_in(path):
                self._add(safe_open(path, framework="pt", device="cpu"))
        with _no_rows_in(*paths):
            for piece, parts in self._parts.items():
                if "data" not in parts or piece._replace(tensor="kv".replace(piece.tensor, "")) not in self._parts:
                    raise ValueError(f"{piece} is not whole")

    def _add(self, file: Any) -> None:
        for owner, part in (name.rsplit(".", 1) for name in file.offset_keys()):  # in the order of writing
            if part in Rows._fields:
                piece = Piece.parse(owner)
                self._files[piece] = file
                self._parts.setdefault(piece, []).append(part)

    @property
    def pieces(self) -> list[Piece]:
        return list(self._parts)

    def rows(self, piece: Piece) -> Rows:
        """The rows of one tensor of one layer, [Bs, rows, ...] on the CPU."""
        file = self._files[piece]
        return Rows(**{part: file.get_tensor(f"{piece}.{part}") for part in self._parts[piece]})  # views


@contextlib.contextmanager
def _no_rows_in(*paths: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{' and '.join(map(str, paths))} holds no source rows: {error}") from error


def digest(path: Path, stopped: threading.Event | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal; of its beginning where `stopped` is set meanwhile."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(BLOCK_BYTES)) and not (stopped is not None and stopped.is_set()):
            state.update(block)
    return state.hexdigest()
