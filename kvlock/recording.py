"""A recording, opened: the source rows of all locked steps, with a manifest of what they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvlock import checksums, manifest
from kvlock.checksums import Verifier
from kvlock.manifest import TENSORS, hash_of, short, step_name
from kvlock.places import FileShelf
from kvlock.step_file import Piece, StepFile
from kvlock.store import Rows

# How far a token may be from the recorded one: the root mean square over its channels, each in units of its own size.
# The miniature's VAE in bf16 instead of fp32 moves no token by more than 0.03, and another device should move none
# further; where a video shows something else, tokens move by half and more.
TOLERANCE = 0.05


class Recording:
    """A recording on the disk, opened and looked over; edits compare the checksums of its step files as they go.

    Its files must not change while an edit reads them; any number of edits may, at the same time too.

    Attributes:
        path: its folder.
        fields: the manifest.

    Raises:
        ValueError: it is none, or not whole; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = self.path.absolute()  # the current folder may be another one when a step is read
        self.fields = manifest.read(self.path)
        for name, entry in self.fields["files"].items():
            file = self.path / name
            try:
                found = manifest.size_of(file)
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}") from error
            if found != entry["bytes"]:
                is_there = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{file} {is_there}; wanted the {entry['bytes']} bytes that were recorded")
        self._verified: dict[str, checksums.State] = {}  # files that were right when they were last looked at
        checksums.compare(self._folder / TENSORS, self.path / TENSORS, self.fields["files"])
        try:
            self._tensors = load_file(self._folder / TENSORS)
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
        """Of all its files but the manifest."""
        return sum(entry["bytes"] for entry in self.fields["files"].values())

    def verifier(self) -> Verifier:
        """What compares the checksums of step files for one session."""
        return Verifier(self.path, self._folder, self.fields["files"], self._verified)

    def step(self, step: int, verifier: Verifier | None = None) -> StepFile:
        """The file of one step, its checksum compared, by a verifier that may have begun with it.

        Raises:
            ValueError: it is not what was recorded, or was not recorded.
        """
        if step not in self.steps:
            raise ValueError(f"{self.path} has no rows of step {step}; wanted one of {short(self.steps)}")
        file = self._folder / step_name(step)
        if verifier is None:
            checksums.compare(file, self.path / file.name, self.fields["files"])
        else:
            verifier.require(file.name)
        return StepFile(file)

    def agree(self, **facts: Any) -> None:
        """Facts of an edit.

        Raises:
            ValueError: names the first that was another one when the source was recorded, and both values.
        """
        for name, found in facts.items():
            recorded = self.fields.get(name)
            if recorded != found:
                raise self._mismatch(name, short(recorded), short(found))

    def agree_on_settings(self, settings: Mapping[str, Any]) -> None:
        """The settings of an edit's transformers; another version may know other ones. Raises as `agree`."""
        recorded = self.fields.get("settings", {})
        for name in sorted(set(recorded) & set(settings)):
            if recorded[name] != settings[name]:
                raise self._mismatch(f"setting {name}", short(recorded[name]), short(settings[name]))

    def agree_on_part(self, **facts: Sequence[Any]) -> None:
        """Lists of an edit, each of which may be a part of the recorded one; raises as `agree`."""
        for name, found in facts.items():
            recorded = self.fields.get(name, [])
            if not set(found) <= set(recorded):
                raise self._mismatch(name, short(recorded), short(list(found)), wanted="no more than was recorded")

    def agree_on_tensor(self, name: str, tensor: Tensor) -> None:
        """A tensor of an edit, which the recorded one is but for rounding; raises as `agree`."""
        if not self._same(name, tensor):
            raise self._mismatch(name, short(self.fields.get(name)), short(hash_of(tensor)))

    def agree_on_noise(self, noise: Tensor) -> None:
        """An edit's initial noise: the source keeps its own, and a warning says so where they differ."""
        if not self._same("noise", noise):
            seed = self.about.get("seed")
            named = "another seed" if seed is None else f"seed {seed}"
            own = hash_of(noise)[:8]  # one text for each: Python shows a warning of the same text once
            warnings.warn(
                f"the source of {self.path} was noised with {named}: it keeps that noise, and this edit has its own "
                f"({own})",
                stacklevel=2,
            )

    def _same(self, name: str, tensor: Tensor) -> bool:
        """Whether the tensor is the recorded one of this name, or differs from it by rounding in every token."""
        if hash_of(tensor) == self.fields.get(name):
            return True
        recorded = self._tensors.get(name)
        if recorded is None or recorded.shape != tensor.shape or not _may_be_rounded(tensor, recorded):
            return False
        return _farthest(tensor.detach().cpu().double(), recorded.double()) <= TOLERANCE

    def _mismatch(self, name: str, recorded: str, found: str, wanted: str = "them alike") -> ValueError:
        return ValueError(f"{self.path} was recorded with {name} {recorded}, this edit has {found}; wanted {wanted}")


def _may_be_rounded(tensor: Tensor, recorded: Tensor) -> bool:
    """Whether both are numbers that a device computes, latents [B, C, T, h, w] or embeddings [B, L, D]: no settings."""
    known = all(x.is_floating_point() and x.ndim in (3, 5) and x.numel() > 0 for x in (tensor, recorded))
    return known and all(bool(x.isfinite().all()) for x in (tensor, recorded))


def _farthest(tensor: Tensor, recorded: Tensor) -> float:
    """The largest distance of a token from the recorded one, as `TOLERANCE` counts it."""
    channels = 1 if recorded.ndim == 5 else 2
    rest = [axis for axis in range(recorded.ndim) if axis != channels]
    size = recorded.square().mean(dim=rest, keepdim=True).sqrt()
    apart = torch.where(tensor == recorded, 0, (tensor - recorded) / size)
    return apart.square().mean(dim=channels).sqrt().max().item()


class RecordedShelf(FileShelf):
    """The rows of a recording, step by step; nothing is put here."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._verifier = recording.verifier()

    def verify_ahead(self) -> None:
        """Begin to compare the checksums of all step files, in the order in which a run needs them."""
        self._verifier.begin(step_name(step) for step in self._recording.steps)

    def turn_to(self, step: int) -> None:
        super().turn_to(step)
        self._open(self._recording.step(step, self._verifier))

    def close(self) -> None:
        super().close()
        self._verifier.stop()

    def _put(self, piece: Piece, rows: Rows) -> None:
        raise ValueError(f"{self._recording.path} is recorded already; wanted no source pass")
