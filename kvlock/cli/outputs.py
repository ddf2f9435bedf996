"""Where results go: checked before the work, and moved there after it, one rename a file, which no signal parts."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvlock.cli.signals import Interrupts

PREFIX = ".kvlock-"


def check(out: Path, beside: Sequence[str], inputs: Sequence[Path]) -> None:
    """Refuse an output that could not be written, before the work is done.

    Args:
        out: the video to write.
        beside: names of the other files, written to the same folder.
        inputs: resolved paths that must survive.

    Raises:
        ValueError: the name is no video's or is taken by a folder, two outputs or an output and an input are one
            file, the files would add to a folder of input pictures, or the folder cannot be written to.
    """
    from kvlock.video import check_writable

    check_writable(out)
    if out.name in beside:
        raise ValueError(f"--out {out} has the name of another result; wanted none of {', '.join(beside)}")
    targets = (out, *(out.with_name(name) for name in beside))
    for target in targets:
        if target.resolve().parent in inputs:
            raise ValueError(f"{target.parent} is an input folder, which must not change; choose another with --out")
        if target.resolve() in inputs:
            raise ValueError(f"{target} is an input and would be overwritten; choose another folder with --out")
        if os.path.isdir(target):
            raise ValueError(f"{target} is a folder, where a file is to be written; choose another folder with --out")
    base = _nearest_folder(out.parent)
    try:  # permissions say nothing of read-only disks, pseudo file systems and names that are too long
        with _temporary_folder(base) as (probe, _):
            folder = probe / out.parent.resolve().relative_to(base)
            folder.mkdir(parents=True, exist_ok=True)
            for target in targets:
                (folder / target.name).touch()
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; choose another place or name with --out") from error


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` when the block ends well, and vanish with it when it does not.

    A signal that comes during the moves raises its exception after the last of them. What else is in `folder` stays.

    Raises:
        ValueError: something could not be written; the message names `folder`, not the temporary one.
    """
    try:
        with _temporary_folder(_nearest_folder(folder)) as (temporary, interrupts):
            yield temporary
            interrupts.held = True
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot write the results to {folder}: {error}") from error


@contextlib.contextmanager
def _temporary_folder(base: Path) -> Iterator[tuple[Path, Interrupts]]:
    """A folder in `base` that is gone after the block; a signal interrupts neither its making nor its removal."""
    interrupts = Interrupts()
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        try:
            try:
                interrupts.release()
                yield folder, interrupts
            finally:
                interrupts.held = True  # a signal before this line holds the next ones itself: the removal is safe
        finally:
            shutil.rmtree(folder)
    finally:
        interrupts.restore()


def _nearest_folder(folder: Path) -> Path:
    """The folder itself or the closest one above it that exists: on the same disk, so that a move is a rename.

    Raises:
        ValueError: a file is in the way.
    """
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise ValueError(f"cannot make folder {folder}: {existing} is a file")
    return existing
