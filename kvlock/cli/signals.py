"""Ctrl-C and SIGTERM: both end a command by an exception, which waits while files are made, moved or removed.

A reader of its output that leaves, as `head` does, ends it as well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn


class Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt it is no error that a command could handle."""


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises `Terminated`; outside the main thread, which alone gets signals, nothing changes.

    Raises:
        Terminated: SIGTERM has come.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not _in_main_thread() or before is None:  # None: somebody else's handler, which Python could not put back
        yield
        return
    try:
        signal.signal(signal.SIGTERM, _terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ends_when_unread() -> Iterator[None]:
    """A command in the block whose output nobody reads any more, as behind ``| head``, ends in silence.

    The signal itself, SIGPIPE, stays ignored: it would also end a process that feeds ffmpeg, when that fails.

    Raises:
        SystemExit: with what a shell reports for a program ended by SIGPIPE.
    """
    unread = SystemExit(128 + signal.SIGPIPE)
    try:
        yield
    except BrokenPipeError:
        _all_read()
        raise unread from None
    except SystemExit:
        if not _all_read():
            raise unread from None
        raise
    except BaseException:  # which is to be told, read or not
        _all_read()
        raise
    if not _all_read():
        raise unread


def _all_read() -> bool:
    """Sends what is left of the output. Where nobody reads it, what Python flushes at its end goes nowhere."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


class Interrupts:
    """Takes the signals that raise an exception, and lets one through at most.

    Their handlers are replaced, not the thread's mask: a signal that the main thread masks goes to another one, and
    Python then runs its handler in the main thread all the same.

    Attributes:
        held: signals wait. It is so at first, and again from the moment in which one is let through, so that the
            clean-up which that one sets off is not cut short by the next.
    """

    def __init__(self) -> None:
        self.held = True
        self._waiting: list[int] = []
        self._raised = False
        # One without a Python handler ends the process or is ignored: there is no exception to hold back.
        numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        self._before = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in self._before:
            signal.signal(number, self._receive)

    def release(self) -> None:
        """From here on a signal may interrupt; raises what the one that has waited raises."""
        self.held = False
        if self._waiting:
            self._receive(self._waiting[0], None)

    def restore(self) -> None:
        """Put the former handlers back; raises what a signal that still waits raises."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._waiting and not self._raised:
            self._before[self._waiting[0]](self._waiting[0], None)

    def _receive(self, number: int, frame: Any) -> None:
        if self.held:
            self._waiting.append(number)
            return
        self.held = self._raised = True
        self._before[number](number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
