"""Recordings that are broken or foreign: refused by the name of the file; and who may read them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanPipeline
from recordings import edit, make
from safetensors.torch import save_file

from kvlock import Recording, Store, manifest
from kvlock.step_file import digest

STEP = "step-0004.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(WanPipeline)


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    return make(pipe, tmp_path_factory.mktemp("whole") / "source.kvlock", store=Store("fp8")).path


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy.kvlock"))


def flip(file: Path, at: int) -> None:
    """One bit of the byte at this place, counted from the end where it is negative."""
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def replace_by_pickle(file: Path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(file.parent / "unpickled"),)

    file.write_bytes(pickle.dumps(Trap()).ljust(file.stat().st_size, b"\0"))


def replace_by_other_tensors(file: Path) -> None:
    size = file.stat().st_size
    save_file({"x": torch.zeros(8)}, file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "bytes; wanted the"),
        (Path.unlink, "is missing; wanted the"),
        (lambda file: flip(file, -1), "has checksum"),
        (lambda file: flip(file, 20), "has checksum"),
        (replace_by_pickle, "has checksum"),
        (replace_by_other_tensors, "has checksum"),
    ],
    ids=["truncated", "missing", "bit-of-the-data", "bit-of-the-header", "pickle", "other-tensors"],
)
@pytest.mark.parametrize("name", [STEP, "tensors.safetensors"])
def test_a_file_that_is_not_what_was_recorded_is_refused_by_name(pipe, copy, harm, message, name):
    edit(pipe, recording=Recording(copy))
    harm(copy / name)
    with pytest.raises(ValueError) as error:
        edit(pipe, recording=Recording(copy))
    assert str(copy / name) in str(error.value) and message in str(error.value)
    assert tiny.leftovers(pipe) == [] and not (copy / "unpickled").exists()


@pytest.mark.parametrize("name", [STEP, "tensors.safetensors"])
def test_a_pickle_that_a_manifest_was_written_for_is_refused_by_name_and_left_packed(pipe, copy, name):
    replace_by_pickle(copy / name)
    fields = manifest.read(copy)
    fields["files"][name]["sha256"] = digest(copy / name)
    manifest.write(fields, copy / "manifest.json")
    with pytest.raises(ValueError, match=rf"{copy / name} (holds no source rows|cannot be read): "):
        edit(pipe, recording=Recording(copy))
    assert tiny.leftovers(pipe) == [] and not (copy / "unpickled").exists()


def test_others_may_read_a_recording(whole):
    umask = os.umask(0)
    os.umask(umask)
    assert whole.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in whole.iterdir()} == {0o666 & ~umask}


READ = """
import hashlib, sys
from kvlock.recording import Recording
recording = Recording(sys.argv[1])
state = hashlib.sha256()
for step in recording.steps:
    file = recording.step(step)
    for piece in file.pieces:
        state.update(file.rows(piece).data.view(-1).view(__import__("torch").uint8).numpy().tobytes())
print(state.hexdigest())
"""


def test_two_processes_read_one_recording(pipe, whole):
    command = [sys.executable, "-c", READ, str(whole)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    readers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    edit(pipe, recording=Recording(whole))
    first, second = [reader.communicate()[0] for reader in readers]
    assert first == second and len(first) == 65
