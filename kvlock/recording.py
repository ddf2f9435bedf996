"""A recording, opened: the source rows of all locked steps, with a manifest of what they belong to."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvlock.places import Layer, Shelf, read
from kvlock.step_file import Piece, StepFile, digest
from kvlock.store import Rows

FORMAT = 1
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
TOLERANCE = 0.01  # of a relative difference: what another GPU makes of the same video differs in its last bits


class Recording:
    """A recording on the disk, opened and looked over; its step files are read in the background to compare checksums.

    Attributes:
        path: its folder.
        fields: the manifest.

    Raises:
        ValueError: it is none, or not whole; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fields = _read_manifest(self.path)
        for name, entry in self.fields["files"].items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                is_there = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{file} {is_there}; wanted the {entry['bytes']} bytes that were recorded")
        self._checks: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="kvlock-checksum")
        self._verify(TENSORS)
        try:
            self._tensors = load_file(self.path / TENSORS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path / TENSORS} cannot be read: {error}") from error

    @property
    def about(self) -> dict[str, Any]:
        """What its maker has written there, as JSON types."""
        return self.fields.get("about", {})

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that its maker has put there, on the CPU."""
        return {name[6:]: tensor for name, tensor in self._tensors.items() if name.startswith("input.")}

    @property
    def steps(self) -> list[int]:
        """The recorded steps, as indices into the scheduler's table."""
        return self.fields["recorded_steps"]

    @property
    def bytes_on_disk(self) -> int:
        return sum(entry["bytes"] for entry in self.fields["files"].values())

    def verify_ahead(self) -> None:
        """Compare the checksums of all step files, in the background and in the order in which a run needs them."""
        for step in self.steps:
            self._check(step_name(step))

    def step(self, step: int) -> StepFile:
        """The file of one step, its checksum compared.

        Raises:
            ValueError: it is not what was recorded, or was not recorded.
        """
        if step not in self.steps:
            raise ValueError(f"{self.path} has no rows of step {step}; wanted one of {short(self.steps)}")
        self._verify(step_name(step))
        return StepFile(self.path / step_name(step))

    def note(self, **fields: Any) -> None:
        """Facts of an edit.

        Raises:
            ValueError: names the first that was another one when the source was recorded, and both values.
        """
        for name, found in fields.items():
            recorded = self.fields.get(name)
            if recorded != found:
                raise self._mismatch(name, short(recorded), short(found))

    def note_some(self, **fields: Sequence[Any]) -> None:
        """Lists of an edit, each of which may be a part of the recorded one; raises as `note`."""
        for name, found in fields.items():
            recorded = self.fields.get(name, [])
            if not set(found) <= set(recorded):
                raise self._mismatch(name, short(recorded), short(list(found)), wanted="no more than was recorded")

    def note_tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor of an edit, which the recorded one is but for rounding; raises as `note`."""
        found, recorded = hash_of(tensor), self.fields.get(name)
        if found == recorded:
            return
        other = self._tensors.get(name)
        if other is not None and other.shape == tensor.shape:
            difference = (tensor.detach().cpu().double() - other.double()).norm() / other.double().norm()
            if difference <= TOLERANCE:
                return
        raise self._mismatch(name, short(recorded), short(found))

    def note_noise(self, noise: Tensor) -> None:
        """An edit's initial noise: the source keeps its own, and a warning says so where they differ."""
        if hash_of(noise) != self.fields.get("noise"):
            seed = self.fields.get("about", {}).get("seed")
            named = "another seed" if seed is None else f"seed {seed}"
            warnings.warn(
                f"the source of {self.path} was noised with {named}: it keeps that noise, and this edit has its own",
                stacklevel=2,
            )

    def close(self) -> None:
        """Stop comparing checksums."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, name: str) -> Future[None]:
        if name not in self._checks:
            self._checks[name] = self._pool.submit(self._compare, name)
        return self._checks[name]

    def _verify(self, name: str) -> None:
        self._check(name).result()

    def _compare(self, name: str) -> None:
        wanted = self.fields["files"].get(name, {}).get("sha256")
        try:
            found = digest(self.path / name)
        except OSError as error:
            raise ValueError(f"{self.path / name} cannot be read: {error.strerror}") from error
        if found != wanted:
            raise ValueError(f"{self.path / name} has checksum {found[:12]}; wanted {short(wanted)}, as recorded")

    def _mismatch(self, name: str, recorded: str, found: str, wanted: str = "them alike") -> ValueError:
        return ValueError(f"{self.path} was recorded with {name} {recorded}, this edit has {found}; wanted {wanted}")


class RecordedShelf(Shelf):
    """The rows of a recording, step by step; nothing is put here."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._file: StepFile | None = None
        self._bytes = 0

    def turn_to(self, step: int) -> None:
        super().turn_to(step)
        self._file = self._recording.step(step)
        self._order = list(dict.fromkeys(piece.layer for piece in self._file.pieces))
        self._bytes = sum(self._file.rows(piece).bytes_kept for piece in self._file.pieces)

    def clear(self) -> None:
        super().clear()
        self._file, self._bytes = None, 0

    @property
    def bytes_kept(self) -> int:
        return self._bytes

    def _put(self, piece: Piece, rows: Rows) -> None:
        raise ValueError(f"{self._recording.path} is recorded already; wanted no source pass")

    def _load(self, layer: Layer) -> dict[Piece, Rows]:
        assert self._file is not None and self._courier is not None
        return read(self._file, layer, pin=self._courier.stream is not None)


def hash_of(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and values; waits for its device."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    state = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def step_name(step: int) -> str:
    return f"step-{step:04d}.safetensors"


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is no recording: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest.pop("sha256")
        whole = found == hash_of_json(manifest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not the manifest of a recording: {type(error).__name__}: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    if not whole:
        raise ValueError(f"{file} is not what was recorded: its checksum is another one")
    return manifest


def hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short(value: Any) -> str:
    """A value as an error message shows it: the ends of a long one, the beginning of a hash."""
    if isinstance(value, list) and len(value) > 6:
        return f"[{value[0]!r}, {value[1]!r}, ..., {value[-1]!r}] ({len(value)})"
    text = value if isinstance(value, str) else repr(value)
    return text[:12] if len(text) == 64 and " " not in text else text
