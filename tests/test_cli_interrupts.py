"""Tests of the command line under Ctrl-C and SIGTERM: one line, the shell's exit code, and nothing left behind."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvlock import cli
from kvlock.cli import edit, outputs

pytest_plugins = ["command_line"]

ROOT = Path(__file__).parent.parent


def python(source):
    """Run a program in a fresh process, without the warnings that its libraries give."""
    command = [sys.executable, "-W", "ignore", "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv", [["--help"], ["edit", "--help"], ["--version"]])
def test_help_and_version_import_no_torch(argv):
    program = "import sys; from kvlock import cli\ntry: cli.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", program, *argv]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.splitlines()[-1] == "False"


def test_the_package_has_every_public_name_and_no_other():
    program = """
import sys, kvlock
assert set(kvlock.__all__) <= set(dir(kvlock))
assert "torch" not in sys.modules
for name in kvlock.__all__:
    getattr(kvlock, name)
assert kvlock.pipeline.KVLockPipeline is kvlock.KVLockPipeline
exec("from kvlock import *")
assert attach is kvlock.attach and not hasattr(kvlock, "nonsense")
"""
    assert python(program).stderr == ""


def test_ctrl_c_while_options_are_read_is_one_line(kvlock, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupt)
    assert kvlock("edit") == (130, [], ["kvlock: error: interrupted"])


PRINTING = ["kvlock --version", "benchmarks", "benchmarks.report", "benchmarks.roofline"]
RUNNING = [f"benchmarks.{name} --help" for name in ("accuracy", "disk", "edit", "figures", "offline")]


@pytest.mark.parametrize(("line", "unbuffered"), [*itertools.product(PRINTING, ["", "1"]), *((x, "") for x in RUNNING)])
def test_output_that_nobody_reads_ends_a_command_in_silence(line, unbuffered):
    read, write = os.pipe()
    os.close(read)  # as head does behind a pipe
    command = [sys.executable, "-W", "ignore", "-m", *line.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(write, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT, env=environment, timeout=120)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_an_error_is_told_also_where_nobody_reads_the_output():
    read, write = os.pipe()
    os.close(read)
    code = (
        "from kvlock.cli import signals\n"
        "with signals.ends_when_unread():\n"
        "    print('some output')\n"
        "    raise ValueError('the reason')\n"
    )
    with open(write, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT, timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.endswith(b"ValueError: the reason\n"), done.stderr


def now(number):
    """Send a signal to this process and wait until Python has seen it."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


@pytest.fixture
def another_thread():
    """A thread beside the main one, as torch and tqdm have: it may be the one that the system hands a signal to."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize("number, code, word", [(2, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize("stage", ["cli.runs.denoise", "plots.plot_schedule", "video.side_by_side"])
def test_a_signal_during_the_work_leaves_nothing(
    kvlock, here, model, no_denoising, another_thread, monkeypatch, stage, number, code, word
):
    monkeypatch.setattr(f"kvlock.{stage}", lambda *_, **__: now(number))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    found, out, err = kvlock("edit", "--example", "--model", model)
    assert (found, out, err[-1]) == (code, [], f"kvlock: error: {word}")
    assert not any("Traceback" in line for line in err)
    assert list(here.iterdir()) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number, code", [(2, 130), (15, 143)])
@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_a_temporary_folder_is_removed_leaves_nothing(
    kvlock, here, model, no_denoising, another_thread, monkeypatch, call, number, code
):
    remove, calls = shutil.rmtree, []

    def interrupted(path, *args, **kwargs):
        if Path(path).parent == here.resolve():  # the first is the probe's, the second that of the results
            calls.append(path)
            if len(calls) == call:
                now(number)
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert kvlock("edit", "--example", "--model", model)[0] == code
    assert len(calls) == call
    assert not [path for path in here.rglob("*") if path.name.startswith(outputs.PREFIX)]


def test_a_signal_between_two_moves_waits_for_the_others(
    kvlock, here, model, no_denoising, another_thread, monkeypatch, written
):
    move, moved = os.replace, []

    def interrupted(source, target):
        if Path(source).parent.name.startswith(outputs.PREFIX) and Path(target).parent.name == "kvlock-out":
            moved.append(target)
            now(signal.SIGINT)
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert kvlock("edit", "--example", "--model", model)[0] == 130
    everything = ["out.mp4", *edit.BESIDE, *edit.BESIDE_EXAMPLE]
    assert written(here) == sorted(f"kvlock-out/{name}" for name in everything)
    assert len(moved) == len(everything)


def test_a_second_signal_does_not_stop_the_clean_up_after_the_first(tmp_path, another_thread, monkeypatch):
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (now(signal.SIGINT), remove(path)))
    with pytest.raises(KeyboardInterrupt), outputs.staged(tmp_path / "results"):
        now(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_thread_other_than_the_main_one_stages_too(tmp_path):
    def stage():
        with outputs.staged(tmp_path / "results") as folder:
            (folder / "a.txt").write_text("a")

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "a.txt"]


def test_a_thread_other_than_the_main_one_runs_a_command(kvlock):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(kvlock("--version")[0]))
    thread.start()
    thread.join()
    assert codes == [0]
