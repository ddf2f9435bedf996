"""The command `kvlock`: edit a video, record its source, estimate the cost, show what is locked, calibrate the lock."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from kvlock.cli import calibrate, edit, estimate, mask, record, signals

# What a shell reports for a program ended by a signal: 128 and its number.
INTERRUPTED, TERMINATED = 130, 143


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is one `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvlock: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        from kvlock import __version__

        print(f"kvlock {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of the parsed arguments."""
    parser = _Parser(prog="kvlock", description="Training-free video editing that leaves the background alone.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (edit, record, estimate, mask, calibrate):
        name = module.__name__.rsplit(".", 1)[-1]
        summary = (module.__doc__ or "").split(": ", 1)[1]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or with one line on stderr 2 for bad input, 1 for too little memory, 130 for Ctrl-C, 143 for
        SIGTERM. Where nobody reads on what it prints, 141 without a line.
    """
    try:
        with signals.ends_when_unread(), signals.termination_raises(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments = build_parser().parse_args(argv)
            arguments.run(arguments)
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 2)
    except (MemoryError, RuntimeError) as error:
        from kvlock.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        hint = "try --offload model, --offload group, --dtype bfloat16 or a smaller video"
        return _fail("; ".join(["out of memory", *getattr(error, "__notes__", ()), hint]), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except signals.Terminated:
        return _fail("terminated", TERMINATED)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"kvlock: error: {message}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from tqdm import tqdm

    # Moves a progress bar that is being drawn out of the way, so that the warning has a line of its own.
    tqdm.write(f"kvlock: warning: {' '.join(str(message).split())}", file=sys.stderr)
