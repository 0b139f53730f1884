"""Frames over a socket, with a deadline and a limit on what is taken in."""

import os
import select
import struct
import time

from autograder.isolation.wire import MAX_FRAME_BYTES, WireError


class Closed(Exception):
    """The other side is gone."""


class Late(Exception):
    """The deadline has passed."""


class Channel:
    """Sends and receives whole frames. `deadline` is a time.monotonic(), or None for no limit.

    `descriptor` is one end of a socket pair. It is read and written as a file: the sandbox refuses
    the calls for sockets.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self.deadline: float | None = None
        self.budget_bytes: int | None = None

    def send(self, frame: bytes) -> None:
        """Raises: Closed, Late; WireError for a frame that is too large."""
        if len(frame) > MAX_FRAME_BYTES:
            raise WireError(f"frame of {len(frame):,} bytes: at most {MAX_FRAME_BYTES:,} travel")
        view = memoryview(struct.pack("<I", len(frame)) + frame)
        while view:
            self._wait(for_reading=False)
            try:
                view = view[os.write(self._descriptor, view[: 2**20]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Closed from None

    def receive(self) -> bytes:
        """Raises: Closed, Late; WireError for a frame, or frames together, that are too large."""
        (length,) = struct.unpack("<I", self._exactly(4))
        if length > MAX_FRAME_BYTES or length < 4:
            raise WireError(f"frame of {length:,} bytes")
        if self.budget_bytes is not None:
            self.budget_bytes -= length
            if self.budget_bytes < 0:
                raise WireError("too much data in all")
        return self._exactly(length)

    def close(self) -> None:
        os.close(self._descriptor)

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(for_reading=True)
            try:
                part = os.read(self._descriptor, min(size - len(parts), 2**20))
            except BlockingIOError:
                continue
            except OSError:
                raise Closed from None
            if not part:
                raise Closed
            parts += part
        return bytes(parts)

    def _wait(self, for_reading: bool) -> None:
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Late
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN if for_reading else select.POLLOUT)
        if not poll.poll(None if left is None else left * 1000):
            raise Late
