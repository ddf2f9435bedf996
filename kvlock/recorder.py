"""A recording in the making: a folder of source rows that gets its name when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvlock.places import Layer, Shelf
from kvlock.recording import FORMAT, MANIFEST, TENSORS, hash_of, hash_of_json, short, step_name
from kvlock.step_file import Piece, StepWriter, digest
from kvlock.store import Rows


class Recorder(Shelf):
    """Writes a recording into a hidden folder beside `path`, which `finish` gives its name: there is all or nothing.

    Raises:
        ValueError: there is something at `path`, or nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        check_path(self.path)
        with _named_errors(self.path):
            self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".kvlock-", dir=self.path.absolute().parent))
        self._fields: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._writer: StepWriter | None = None
        self._step_bytes = 0

    def note(self, **fields: Any) -> None:
        """Facts that an edit must share, as JSON types.

        Raises:
            ValueError: one has been noted with another value.
        """
        for name, value in fields.items():
            if self._fields.setdefault(name, value) != value:
                first, then = short(self._fields[name]), short(value)
                raise ValueError(f"{self.path} is being recorded with {name} {first}, then with {then}; wanted one")

    def note_some(self, **fields: Sequence[Any]) -> None:
        """Lists of which an edit may use a part."""
        self._fields |= {name: list(values) for name, values in fields.items()}

    def note_tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor that an edit must share, but for the rounding of another device."""
        self._tensors[name] = tensor.detach().cpu().contiguous()
        self._fields[name] = hash_of(tensor)

    def note_noise(self, noise: Tensor) -> None:
        """The initial noise, which an edit may replace for itself."""
        self._fields["noise"] = hash_of(noise)

    def keep_inputs(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """What the caller wants to find again: tensors under names of its own, and JSON types."""
        self._tensors |= {f"input.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self._fields["about"] = dict(about)

    def turn_to(self, step: int) -> None:
        super().turn_to(step)
        if step_name(step) in self._files:
            raise ValueError(f"step {step} of {self.path} is recorded already; wanted one call of the pipeline")
        self._writer, self._step_bytes = StepWriter(self._folder / step_name(step)), 0

    def seal(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._enter(self._writer.path)
        self._writer = None

    def finish(self) -> None:
        """The recording is whole: give it its name.

        Raises:
            ValueError: no step has been recorded, or the rest cannot be written.
        """
        steps = sorted(int(name[5:9]) for name in self._files)
        if not steps:
            raise ValueError(f"nothing was recorded for {self.path}: no step of a run was locked inside the block")
        with _named_errors(self.path):
            tensors = self._folder / TENSORS
            save_file(self._tensors, tensors)
            self._enter(tensors)
            manifest = {"format": FORMAT, "recorded_steps": steps, **self._fields, "files": self._files}
            text = json.dumps(manifest | {"sha256": hash_of_json(manifest)}, indent=1, allow_nan=False)
            with (self._folder / MANIFEST).open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(self._folder, self.path)

    def close(self) -> None:
        """Remove what has not become a recording."""
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def bytes_kept(self) -> int:
        return self._step_bytes

    def _put(self, piece: Piece, rows: Rows) -> None:
        assert self._writer is not None
        self._writer.add(piece, rows)
        self._step_bytes += rows.bytes_kept

    def _load(self, layer: Layer) -> dict[Piece, Rows]:
        raise ValueError(f"{self.path} is being recorded; wanted an edit that attaches to it afterwards")

    def _enter(self, file: Path) -> None:
        self._files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}


def check_path(path: Path) -> None:
    """Wants a place for a recording; raises ValueError where there is something already."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; wanted a path where there is nothing yet")


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
