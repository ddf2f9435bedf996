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

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvlock import manifest
from kvlock.manifest import FORMAT, MANIFEST, TENSORS, UNFINISHED, hash_of, short, step_name
from kvlock.places import Shelf
from kvlock.step_file import NAMES, Piece, StepWriter, digest
from kvlock.store import Rows
from kvlock.transit import Layer, Outbox


class Recorder(Shelf):
    """Writes a recording into a hidden folder beside `path`, which `finish` gives its name: there is all or nothing.

    What `kvlock.recording.Recording` compares by methods of the same names is noted here.

    Raises:
        ValueError: there is something at `path`, or nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._target = self.path.absolute()  # the current folder may be another one when the recording is whole
        check_path(self.path)
        parents = [self._target.parent, *self._target.parent.parents]
        self._made: list[Path] = []  # folders above it that were not there, the deepest first
        try:
            with _named_errors(self.path), contextlib.ExitStack() as undo:
                self._made = [parent for parent in parents if not os.path.lexists(parent)]
                self._target.parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self._target.parent))
                undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
                probe = self._folder / self._target.name  # a name that cannot be given is found now, not at the end
                probe.mkdir()
                probe.rmdir()
                undo.pop_all()
        except ValueError:
            self._remove_parents()
            raise
        self._facts: dict[str, Any] = {"about": {}}
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._steps: list[int] = []
        self._writer: StepWriter | None = None
        self._outbox = Outbox()
        self._step_bytes = 0
        self._ended = False

    def end_run(self) -> None:
        """The run has taken its last step."""
        self._ended = True

    def agree(self, **facts: Any) -> None:
        """Facts that an edit must share, as JSON types.

        Raises:
            ValueError: one has been noted with another value.
        """
        for name, value in facts.items():
            if self._facts.setdefault(name, value) != value:
                first, then = short(self._facts[name]), short(value)
                raise ValueError(f"{self.path} is being recorded with {name} {first}, then with {then}; wanted one")

    def agree_on_settings(self, settings: Mapping[str, Any]) -> None:
        """The transformers' settings, of which an edit must share those that it has too; raises as `agree`."""
        self.agree(settings=dict(settings))

    def agree_on_part(self, **facts: Sequence[Any]) -> None:
        """Lists of which an edit may use a part; raises as `agree`."""
        self.agree(**{name: list(values) for name, values in facts.items()})

    def agree_on_tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor that an edit must share, but for the rounding of another device; raises as `agree`."""
        self.agree(**{name: hash_of(tensor)})
        self._tensors[name] = _copied(tensor)

    def agree_on_noise(self, noise: Tensor) -> None:
        """The initial noise, which an edit may replace for itself; raises as `agree`."""
        self.agree_on_tensor("noise", noise)

    def keep_inputs(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """What the caller wants to find again: tensors under names of its own, and JSON types.

        Raises:
            ValueError: something in `about` is no JSON type, or in `tensors` no dense tensor of a dtype of files.
        """
        for name, tensor in tensors.items():
            fits = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
            if not fits or tensor.dtype not in NAMES:
                found = type(tensor).__name__
                if isinstance(tensor, Tensor):
                    found = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
                wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
                raise ValueError(f"input {name} is {found}; wanted a dense tensor of one of {wanted}")
        try:
            known = json.loads(json.dumps(dict(about), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"about={dict(about)!r} cannot be written: {error}; wanted JSON types") from error
        self._tensors |= {f"input.{name}": _copied(tensor) for name, tensor in tensors.items()}
        self._facts["about"] = known

    def turn_to(self, step: int) -> None:
        super().turn_to(step)
        if step in self._steps:
            raise ValueError(f"step {step} of {self.path} is recorded already; wanted one call of the pipeline")
        self._steps.append(step)
        self._writer, self._step_bytes = StepWriter(self._folder / step_name(step)), 0

    def seal(self) -> None:
        assert self._writer is not None
        self._outbox.finish()
        self._writer.close()
        self._enter(self._writer.path)
        self._writer = None

    def finish(self) -> None:
        """The recording is whole: give it its name.

        Raises:
            ValueError: no step has been recorded, the rest cannot be written, or there is something at its path now.
        """
        if not self._files:
            raise ValueError(f"nothing was recorded for {self.path}: no step of a run was locked inside the block")
        if not self._ended or self._writer is not None:
            raise ValueError(f"{self.path} is not whole: the call of the pipeline did not come to its end")
        with _named_errors(self.path):
            save_file(self._tensors, self._folder / TENSORS)
            self._enter(self._folder / TENSORS)
            fields = {"format": FORMAT, "recorded_steps": sorted(self._steps), **self._facts, "files": self._files}
            manifest.write(fields, self._folder / MANIFEST)
            _sync(self._folder / MANIFEST)
            mask = _umask()
            for file in self._folder.iterdir():
                os.chmod(file, 0o666 & ~mask)
            os.chmod(self._folder, 0o777 & ~mask)  # a temporary folder is its owner's alone
            check_path(self._target)
            os.rename(self._folder, self._target)

    def clear(self) -> None:
        try:
            super().clear()
        finally:
            self._outbox.discard()

    def close(self) -> None:
        """Remove what has not become a recording."""
        try:
            super().close()
        finally:  # also where the device is lost, and no copy can be waited for
            if self._writer is not None:
                self._writer.discard()
            shutil.rmtree(self._folder, ignore_errors=True)
            if not os.path.lexists(self._target):
                self._remove_parents()

    def _remove_parents(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # something else is in it, or it is another's name for one
                folder.rmdir()

    @property
    def bytes_kept(self) -> int:
        return self._step_bytes

    def _put(self, piece: Piece, rows: Rows) -> None:
        assert self._writer is not None
        self._outbox.add(self._writer, piece, rows, self._copy_stream)
        self._step_bytes += rows.bytes_kept

    def _load(self, layer: Layer) -> dict[str, Rows]:
        raise ValueError(f"{self.path} is being recorded; wanted an edit that attaches to it afterwards")

    def _enter(self, file: Path) -> None:
        with _named_errors(file):
            _sync(file)
            self._files[file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}


def check_path(path: Path) -> None:
    """Wants a place for a recording; raises ValueError where there is something, or for a name that cannot be its."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; wanted a path where there is nothing yet")
    if path.name.startswith(UNFINISHED):
        raise ValueError(f"{path} has the name of a recording that is not whole; wanted one without {UNFINISHED}")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # readers of the format take no other paths
        raise ValueError(f"{path!r} is no text in UTF-8; wanted one that is") from error


def _copied(tensor: Tensor) -> Tensor:
    """Its values now, on the CPU, as a file holds them."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _sync(file: Path) -> None:
    """Wait until the disk has it."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:  # a path with a null byte is no OSError
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
