"""A rank's line to the referee: announces calls, and hears which may start."""

import json
import select
import socket
import time
from typing import Any

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.collectives import CollectiveMismatch
from reference.parallel.ranks.referee import encode, form_of
from reference.parallel.ranks.scheduler import Deadlock, Released

PATIENCE_SECONDS = 0.05  # how long a rank waits before it says so, and then says so again
MAX_FORMS = 4096
ERRORS: dict[str, type[BaseException]] = {
    "CollectiveMismatch": CollectiveMismatch, "Deadlock": Deadlock, "Released": Released,
}  # fmt: skip


class Control:
    """One rank's end of the line."""

    def __init__(self, line: socket.socket, timeout_seconds: float) -> None:
        self._line, self._timeout_seconds = line, timeout_seconds
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)
        self._received = b""
        self._groups: dict[Group, int] = {}
        self._forms: dict[tuple[Any, ...], int] = {}
        self._count = 0

    def announce(self, call: Call) -> int:
        """Tell of a call; its number, by which `receive` answers.

        Programs repeat themselves: a call is spelt out once, and then said by its form's number.
        """
        self._count += 1
        form = form_of(call)
        if form not in self._forms:
            if len(self._forms) >= MAX_FORMS:
                self._forms.clear()
            if call.group not in self._groups:
                self._groups[call.group] = len(self._groups)
                self._send(["group", call.group.name, call.group.ranks])
            self._forms[form] = len(self._forms)
            self._send(["form", self._forms[form], encode(call, self._groups[call.group])])
        self._line.sendall(b'["call",%d,%d]\n' % (self._count, self._forms[form]))
        return self._count

    def end(self, how: str, reason: str = "") -> None:
        """Tell that this rank "has finished" or "has failed"."""
        try:
            self._send(["end", how, reason])
        except OSError:
            pass  # nobody is left to be told

    def receive(self, seconds: float = 0.0) -> list[tuple[int, BaseException | None]]:
        """Calls by number, and None (it may start) or what has gone wrong; waits that long."""
        if not self._poll.poll(1000 * seconds):
            return []
        chunk = self._line.recv(1 << 16)
        if not chunk:
            raise Released("the referee of the ranks has gone")
        *messages, self._received = (self._received + chunk).split(b"\n")
        answers = [json.loads(message) for message in messages]
        return [(n, ERRORS[kind](*text) if kind != "go" else None) for n, kind, *text in answers]

    def answers_to(self, number: int, call: Call) -> Any:
        """All that is heard until the call is answered, piece by piece.

        Raises: TimeoutError after `timeout_seconds`.
        """
        started, num_told = time.monotonic(), 0
        while True:
            yield self.receive(PATIENCE_SECONDS * (1 + num_told))
            num_told += 1
            self._send(["wait", number, num_told])
            waited = time.monotonic() - started
            if waited > self._timeout_seconds:
                raise TimeoutError(
                    f"waited {waited:.0f} s for ranks that are at work elsewhere, in "
                    f"{call.describe()}"
                )

    def _send(self, message: list[Any]) -> None:
        self._line.sendall(json.dumps(message).encode() + b"\n")
