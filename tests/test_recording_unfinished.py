"""Recordings that are never finished: nothing is left that opens, and nothing that is half written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import tiny
import torch
from diffusers import WanPipeline

import kvlock
from kvlock import KVLockConfig, Recording, Store

CONFIG = KVLockConfig(kappa=2, window=2, tau=0.6)
STEPS = 4
STEP = "step-0003.safetensors"


def record(pipe: Any, path: Path, inputs: dict[str, torch.Tensor] | None = None, **options: Any) -> None:
    options = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT} | options
    with kvlock.record(pipe, path, tiny.source_latents(), tiny.masks(pipe), **options) as session:
        session.keep_inputs(inputs or {}, {})
        tiny.call(pipe, steps=STEPS)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(WanPipeline)


def test_a_name_that_is_no_text_is_refused_before_the_work(pipe, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    with pytest.raises(ValueError, match=r"is no text in UTF-8"):
        record(pipe, path)
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


def test_the_disk_has_every_file_before_the_recording_has_its_name(pipe, tmp_path, monkeypatch):
    events: list[str] = []
    sync, rename = os.fsync, os.rename
    where = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(where(descriptor)), sync(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths))[1])
    record(pipe, tmp_path / "source.kvlock")
    assert events == ["step-0002.safetensors", STEP, "tensors.safetensors", "manifest.json", "rename"]


def test_nothing_is_recorded_over(pipe, tmp_path):
    whole = tmp_path / "source.kvlock"
    record(pipe, whole)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match=r"source.kvlock exists already; wanted a path where there is nothing yet"):
        record(pipe, whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert len(list(whole.parent.iterdir())) == 1


def test_an_interrupted_recording_leaves_nothing(pipe, tmp_path):
    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == STEPS - 1:
            raise KeyboardInterrupt
        return kwargs

    options: dict[str, Any] = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
    with pytest.raises(KeyboardInterrupt), kvlock.record(
        pipe, tmp_path / "a", tiny.source_latents(), tiny.masks(pipe), **options
    ):  # fmt: skip
        tiny.call(pipe, steps=STEPS, callback_on_step_end=interrupt)
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


KILLED = """
import os, signal, sys
import tiny, kvlock
from diffusers import WanPipeline
from kvlock import manifest
from kvlock.step_file import StepWriter

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def record(path, step_end=lambda *_: {}):
    pipe = tiny.pipeline(WanPipeline)
    config = kvlock.KVLockConfig(kappa=2, window=2, tau=0.6)
    options = dict(config=config, source_prompt_embeds=tiny.SOURCE_PROMPT)
    with kvlock.record(pipe, path, tiny.source_latents(), tiny.masks(pipe), **options):
        tiny.call(pipe, steps=4, callback_on_step_end=step_end)

def in_a_step_file(path):
    add = StepWriter.add
    StepWriter.add = lambda writer, piece, rows: add(writer, piece, rows) if piece.block == 0 else die()
    record(path)

def after_the_last_step(path):
    record(path, lambda pipe, step, *_: {} if step < 3 else die())

def before_the_manifest(path):
    manifest.write = die
    record(path)

def before_the_name(path):
    os.rename = die
    record(path)

for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        globals()[name](f"{sys.argv[1]}/{name}/source.kvlock")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
"""
POINTS = {
    "in_a_step_file": ["step-0002.safetensors"],
    "after_the_last_step": ["step-0002.safetensors", STEP],
    "before_the_manifest": ["step-0002.safetensors", STEP, "tensors.safetensors"],
    "before_the_name": ["manifest.json", "step-0002.safetensors", STEP, "tensors.safetensors"],
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each of the points, where a recording was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}  # it forks
    command = [sys.executable, "-c", KILLED, str(folder), *POINTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_recording_never_opens(killed, tmp_path, point):
    (left,) = (killed / point).iterdir()
    assert left.name.startswith(".kvlock-") and sorted(file.name for file in left.iterdir()) == POINTS[point]
    link = tmp_path / "link"
    link.symlink_to(left)
    for path in (left, link):
        with pytest.raises(ValueError, match=f"{path} is no recording: it (has no manifest.json|was cut off before)"):
            Recording(path)


def test_a_recording_cannot_have_the_name_of_one_that_is_not_whole(pipe, tmp_path):
    with pytest.raises(ValueError, match=r".kvlock-mine has the name of a recording that is not whole; wanted one wit"):
        record(pipe, tmp_path / ".kvlock-mine")
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


def test_a_full_disk_is_one_error_that_names_the_file(pipe, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17 + 1000, hard))  # stands for it: writing fails in the same way
    try:
        with pytest.raises(ValueError, match=r"cannot write .*step-0002.safetensors: File too large"):
            record(pipe, tmp_path / "source.kvlock")
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # enough for the steps, not for the latents
        with pytest.raises(ValueError, match=r"cannot write .*source.kvlock: .*File too large"):
            record(pipe, tmp_path / "source.kvlock", inputs={"frames": torch.zeros(200_000, dtype=torch.uint8)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17 + 1000, hard))
        options: dict[str, Any] = {"config": CONFIG, "source_prompt_embeds": tiny.SOURCE_PROMPT}
        store = Store(place="disk", folder=tmp_path)
        with pytest.raises(ValueError, match=r"cannot write .*/[kv]0.safetensors: File too large"):
            with kvlock.attach(pipe, tiny.source_latents(), tiny.masks(pipe), store=store, **options):
                tiny.call(pipe, steps=STEPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


class FullDisk:
    """A file as Python opens it, on a disk where there is room for so many bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_no_space_left_is_one_error_that_names_the_file(pipe, tmp_path, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(opened(path, mode), 1000))
    with pytest.raises(ValueError, match=r"^cannot write .*step-0002.safetensors: No space left on device$"):
        record(pipe, tmp_path / "source.kvlock")
    assert list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


def test_a_folder_that_takes_no_file_is_one_error(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/source.kvlock: (File exists|Not a directory)"):
        record(pipe, tmp_path / "file" / "source.kvlock")
    assert tiny.leftovers(pipe) == []


@pytest.mark.parametrize(
    "name",
    ["x" * 256, "a\0b", "p/q/" + "x" * 256, "p/" + "x" * 256 + "/q"],
    ids=["long", "null", "long-in-new-folders", "long-folder"],
)
def test_a_name_that_cannot_be_given_is_found_before_the_run(pipe, tmp_path, name):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"cannot write .*(File name too long|null (byte|character))"):
        record(pipe, tmp_path / name)
    hook.remove()
    assert calls == [] and list(tmp_path.iterdir()) == [] and tiny.leftovers(pipe) == []


def test_folders_that_were_made_for_a_recording_that_failed_go_with_it(pipe, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError, match="stop"):
        with kvlock.record(
            pipe, tmp_path / "there/p/q/source.kvlock", tiny.source_latents(), tiny.masks(pipe), config=CONFIG,
            source_prompt_embeds=tiny.SOURCE_PROMPT,
        ):
            raise RuntimeError("stop")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
