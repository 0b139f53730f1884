"""Limits around a student's code: time, and how much it prints."""

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class OutOfTime(BaseException):
    """Raised inside code that outran its limit; no Exception, so that few handlers eat it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`, and again each half second until it ends.

    Works in the main thread on systems with interval timers; elsewhere the block runs unlimited.
    A single native call that never returns is ended only by the supervisor (autograder.worker).
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class BoundedText(io.TextIOBase):
    """A stream that keeps the first `limit` characters and counts the rest."""

    def __init__(self, limit: int = 2000) -> None:
        self.limit = limit
        self.kept = ""
        self.written = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.written < self.limit:
            self.kept += text[: self.limit - self.written]
        self.written += len(text)
        return len(text)

    def summary(self, lines: int = 8) -> str:
        """The first lines of what was printed, and how much more there was; '' for nothing."""
        if not self.written:
            return ""
        shown = "\n".join(self.kept.splitlines()[:lines])
        left = self.written - len(shown.rstrip("\n"))
        return shown + (f"\n... and {left:,} more characters" if left > 1 else "")


@contextlib.contextmanager
def captured_output() -> Iterator[BoundedText]:
    """Collect what the block prints on stdout and stderr, bounded, instead of showing it."""
    text = BoundedText()
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = text
    try:
        yield text
    finally:
        sys.stdout, sys.stderr = before
