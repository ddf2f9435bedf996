"""The manifest of a recording: what a reader refuses, by the name of the file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from diffusers import WanPipeline
from recordings import make

from kvlock import Recording, manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tiny.pipeline(WanPipeline), tmp_path_factory.mktemp("whole") / "source.kvlock").path


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy.kvlock"))


def rewritten(path: Path, **changes: Any) -> None:
    """The manifest with other entries, and the checksum that fits them."""
    manifest.write(manifest.read(path) | changes, path / "manifest.json")


def test_a_manifest_written_anew_opens(copy):
    before = (copy / "manifest.json").read_bytes()
    rewritten(copy)
    assert (copy / "manifest.json").read_bytes() == before and Recording(copy).steps == [3, 4, 5]


def test_every_bit_of_a_manifest_counts(tmp_path, monkeypatch):
    """Also one that leaves every value as it is, as another spelling of a number does, or a blank."""
    hashes = {"step-0003.safetensors": {"bytes": 9, "sha256": "0f" * 32}}
    fields: dict[str, Any] = {"format": 1, "recorded_steps": [3], "locked_steps": [3], "layers": ["0.blocks.0"]}
    fields |= {"steps": 4, "rows": {}, "about": {"tiny": 1e-06, "large": 1e22, "é": None}, "files": hashes}
    file = tmp_path / "manifest.json"
    manifest.write(fields, file)
    assert manifest.read(tmp_path) == fields
    whole = file.read_bytes()
    assert b"1e-06" in whole and b"1e+22" in whole
    flipped = bytearray(whole)
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(flipped))  # thousands of files would take long to write
    for bit in range(8 * len(whole)):
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=re.escape(str(file))):
            manifest.read(tmp_path)
        flipped[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("written", "instead"),
    [(b"\n", b"\r\n"), (b'"steps": 6', b'"steps":6'), (b'"steps": 6', b'"steps": 7, "steps": 6')],
    ids=["line-ends", "blank", "twice"],
)
def test_a_manifest_in_another_spelling_is_not_what_was_recorded(copy, written, instead):
    file = copy / "manifest.json"
    assert written in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(written, instead))
    with pytest.raises(ValueError, match=r"manifest.json is not what was recorded: its checksum is another one"):
        Recording(copy)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "is no recording: it has no manifest.json"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "is not the manifest of a recording"),
        (lambda file: file.write_text(file.read_text().replace(": 6,", ": 7,")), "is not what was recorded"),
        (lambda file: file.write_text("[]"), "is not the manifest of a recording"),
        (lambda file: file.write_text("{}"), "is not the manifest of a recording: KeyError"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "is not the manifest of a recording"),
        (lambda file: rewritten(file.parent, format=2), "has format 2; this version reads 1"),
        (lambda file: file.write_text("[" * 100_000), "is not the manifest of a recording: RecursionError"),
        (lambda file: rewritten(file.parent, files=None), "has files=None; wanted files with bytes and sha256"),
        (lambda file: rewritten(file.parent, files={"x": {}}), "has files={'x': {}}; wanted files with bytes and"),
        (lambda file: rewritten(file.parent, recorded_steps=[None]), "has recorded_steps=[None]; wanted a list of"),
        (lambda file: rewritten(file.parent, layers=None), "has layers=None; wanted a list of names"),
        (lambda file: rewritten(file.parent, steps="x" * 999), "... (999 characters); wanted a number"),
    ],
    ids=["missing", "truncated", "edited", "list", "empty", "binary", "newer", "deep", "files", "no-sums", "steps",
         "layers", "long"],
)
def test_a_manifest_that_is_none_is_refused_by_name(copy, harm, message):
    harm(copy / "manifest.json")
    with pytest.raises(ValueError) as error:
        Recording(copy)
    assert str(copy) in str(error.value) and message in str(error.value)


def test_a_path_with_nothing_or_something_else_is_no_recording(tmp_path):
    with pytest.raises(ValueError, match=r"none is no recording"):
        Recording(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file is no recording"):
        Recording(tmp_path / "file")
    with pytest.raises(ValueError, match="null\0 is no recording"):
        Recording(tmp_path / "null\0")


def test_a_name_in_the_manifest_leads_nowhere_else(copy):
    rewritten(copy, files={"../step-0003.safetensors": {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"manifest.json has files=.*; wanted files with bytes and sha256"):
        Recording(copy)


def test_a_path_that_the_system_refuses_is_one_error():
    with pytest.raises(ValueError, match=r"x/manifest.json cannot be read: File name too long"):
        Recording("x" * 300)


def test_a_file_that_the_system_does_not_show_is_not_called_missing(copy):
    file = copy / "step-0003.safetensors"
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(ValueError, match=r"step-0003.safetensors cannot be read: Too many levels of symbolic links"):
        Recording(copy)
