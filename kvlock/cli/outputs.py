"""Where results go: checked before the work, written in one move after it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


def check(out: Path, beside: Sequence[str], inputs: Sequence[Path]) -> None:
    """Refuse an output that could not be written, before the work is done.

    Args:
        out: the video to write.
        beside: names of the other files, written to the same folder.
        inputs: resolved paths that must survive.

    Raises:
        ValueError: the name is no video's or is taken by a folder, two outputs or an output and an input are one
            file, or the folder cannot be written to.
    """
    from kvlock.video import check_writable

    check_writable(out)
    if out.name in beside:
        raise ValueError(f"--out {out} has the name of another result; wanted none of {', '.join(beside)}")
    for target in (out, *(out.with_name(name) for name in beside)):
        if target.resolve() in inputs:
            raise ValueError(f"{target} is an input and would be overwritten; choose another folder with --out")
        if target.is_dir():
            raise ValueError(f"{target} is a folder, where a file is to be written; choose another folder with --out")
    base = _nearest_folder(out.parent)
    if not os.access(base, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to folder {base}; choose another one with --out")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, and vanish with it when it does not."""
    with tempfile.TemporaryDirectory(prefix=".kvlock-", dir=_nearest_folder(folder)) as name:
        yield Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            os.replace(file, folder / file.name)


def _nearest_folder(folder: Path) -> Path:
    """The folder itself or the closest one above it that exists: on the same disk, so that a move is a rename.

    Raises:
        ValueError: a file is in the way.
    """
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"cannot make folder {folder}: {existing} is a file")
    return existing
