"""What a recording says of itself: the names of its files, the manifest, and the hashes in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
UNFINISHED = ".kvlock-"  # begins the name of a folder whose recording is not whole, and of no other recording
KINDS = {  # of the fields that reading depends on
    "files": "files with bytes and sha256",
    "recorded_steps": "a list of numbers",
    "locked_steps": "a list of numbers",  # the window, of which not every step has to be recorded
    "layers": "a list of names",
    "steps": "a number",
    "rows": "an object",
    "about": "an object",
}
FILE = re.compile(r"step-[0-9]{4,}\.safetensors|tensors\.safetensors")  # no name leads out of the folder
LONGEST = 200  # characters of a value in an error message


def step_name(step: int) -> str:
    """The file of one step of the scheduler's table."""
    return f"step-{step:04d}.safetensors"


def hash_of(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and values, in hexadecimal; waits for its device."""
    state = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def short(value: Any) -> str:
    """A value as an error message shows it: the ends of a long one, the beginning of a hash."""
    if isinstance(value, list) and value and all(_is_hash(entry) for entry in value):
        return repr([entry[:12] for entry in value])
    if isinstance(value, list) and len(value) > 6:
        return f"[{value[0]!r}, {value[1]!r}, ..., {value[-1]!r}] ({len(value)})"
    text = value if isinstance(value, str) else repr(value)
    if _is_hash(value):
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def write(fields: dict[str, Any], file: Path) -> None:
    """The manifest with these fields and their checksum."""
    file.write_bytes(_bytes_of(fields))


def size_of(file: Path) -> int | None:
    """Bytes of a regular file, or None where there is none.

    Raises:
        OSError: the system does not say. (From Python 3.14 on `Path.is_file` keeps that to itself.)
    """
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name with a null character
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def read(folder: Path) -> dict[str, Any]:
    """The fields of a recording's manifest.

    Raises:
        ValueError: there is none, none that this version wrote, or its recording was never finished; the message names
            the file.
    """
    file = folder / MANIFEST
    try:
        if size_of(file) is None:
            raise ValueError(f"{folder} is no recording: it has no {MANIFEST}")
        if os.path.basename(os.path.realpath(folder)).startswith(UNFINISHED):  # whatever name led there
            raise ValueError(f"{folder} is no recording: it was cut off before it got its name")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    try:
        fields = json.loads(content.decode())
        del fields["sha256"]
        whole = content == _bytes_of(fields)  # to the byte: another spelling of the same values is a flipped bit
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not the manifest of a recording: {type(error).__name__}: {error}") from error
    if fields.get("format") != FORMAT:
        raise ValueError(f"{file} has format {fields.get('format')!r}; this version reads {FORMAT}")
    if not whole:
        raise ValueError(f"{file} is not what was recorded: its checksum is another one")
    for name, kind in KINDS.items():
        if not _is(fields.get(name), kind):
            raise ValueError(f"{file} has {name}={short(fields.get(name))}; wanted {kind}")
    return fields


def _is(value: Any, kind: str) -> bool:
    """Whether a value is what `KINDS` says."""
    if kind == "files with bytes and sha256":
        entries = value.values() if isinstance(value, dict) else [None]
        return all(
            isinstance(entry, dict) and _is(entry.get("bytes"), "a number") and _is_hash(entry.get("sha256"))
            for entry in entries
        ) and all(FILE.fullmatch(name) for name in value)
    if kind == "a list of numbers":
        return isinstance(value, list) and all(_is(entry, "a number") for entry in value)
    if kind == "a list of names":
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if kind == "an object":
        return isinstance(value, dict)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _bytes_of(fields: dict[str, Any]) -> bytes:
    """The content of a manifest with these fields; it ends with their checksum."""
    checksum = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields | {"sha256": checksum}, indent=1, allow_nan=False).encode() + b"\n"
