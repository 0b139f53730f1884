"""The referee of real processes: hears of each call before gloo does, and says who may go on.

gloo itself compares nothing: ranks whose calls do not fit corrupt each other's tensors or hang
until a time-out that names no cause. So each rank announces a call and starts it when the referee
says go, which is when all of its ranks have announced theirs and they agree. A rank that has
waited for a moment says so; then the referee knows, as the simulation does, who can still go on:

    at work              can
    waits                can, once all those can for whom it waits
    has finished, died   cannot

The ranks that cannot are in a deadlock, and are told.
"""

import json
import selectors
import socket
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.collectives import CollectiveMismatch, check_agreement
from reference.parallel.ranks.meetings import Meetings, Slot, describe_wait, missing
from reference.parallel.ranks.scheduler import deadlock

NUM_TELLINGS = 4  # of one wait, until it counts although other ranks are at work
Reply = Callable[[int, list[Any]], None]


class Outline(NamedTuple):
    """As much of another process's tensor as calls must agree about."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def encode(call: Call, group: int) -> dict[str, Any]:
    """A call without its values, for `decode`."""
    tensors = {
        name: [list(t.shape), str(t.dtype).removeprefix("torch."), str(t.device)]
        for name, t in (("tensor", call.tensor), ("out", call.out))
        if t is not None
    }
    return {
        "operation": call.operation, "group": group, "reduction": call.reduction,
        "root": call.root, "tag": call.tag, "input_splits": call.input_splits,
        "output_splits": call.output_splits, "what": call.what, "source": call.source,
        "asked_by": call.asked_by,
        **tensors,
    }  # fmt: skip


def form_of(call: Call) -> tuple[Any, ...]:
    """All of a call but its values: what `encode` puts down."""
    given, out = call.tensor, call.out
    return (
        call.operation, call.group, call.reduction, call.root, call.tag, call.input_splits,
        call.output_splits, call.source, call.asked_by,
        None if given is None else (given.shape, given.dtype, given.device),
        None if out is None else (out.shape, out.dtype, out.device),
    )  # fmt: skip


def decode(fields: dict[str, Any], group: Group, rank: int) -> Call:
    """What `encode` has put down, with outlines in place of tensors."""
    given: dict[str, Any] = {**fields, "group": group}
    for name in ("tensor", "out"):
        if name in given:
            shape, dtype, device = given[name]
            given[name] = Outline(tuple(shape), getattr(torch, dtype), torch.device(device))
    for name in ("source", "asked_by", "input_splits", "output_splits"):
        given[name] = None if given[name] is None else tuple(given[name])
    return Call(rank=rank, **given)


class Referee:
    """Matches calls and finds those who wait in vain. `reply(rank, message)` must not block."""

    def __init__(self, world_size: int, reply: Reply) -> None:
        self.waits_at_failure = ""
        self.deadlock_text = ""
        self._reply, self._world_size = reply, world_size
        self._meetings = Meetings()
        self._groups: dict[int, list[Group]] = {rank: [] for rank in range(world_size)}
        self._forms: dict[tuple[int, int], Call] = {}
        self._open: dict[tuple[int, int], tuple[Call, Slot]] = {}
        self._waiting: dict[int, tuple[Call, Slot]] = {}
        self._ended: dict[int, str] = {}
        self._reason = ""
        self._untold: set[int] = set()

    def hear(self, rank: int, message: list[Any]) -> None:
        """Take in what a rank says: a group, a call, that it waits for one, or its end."""
        match message:
            case ["group", name, ranks]:
                self._groups[rank].append(Group(name, tuple(ranks)))
            case ["call", number, form]:
                self._arrive(number, copy(self._forms[rank, form]))
            case ["form", form, fields]:
                call = decode(fields, self._groups[rank][fields["group"]], rank)
                self._forms[rank, form] = call
            case ["wait", number, times]:
                if (rank, number) in self._open:
                    self._waiting[rank] = self._open[rank, number]
                    self._look(is_hasty=times < NUM_TELLINGS)
            case ["end", how, reason]:
                self.end(rank, how, reason)

    def end(self, rank: int, how: str, reason: str = "") -> None:
        """The rank `how` ("has finished", "has failed", "has died"): the first that is said."""
        if rank in self._ended:
            return
        self._ended[rank] = how
        self._waiting.pop(rank, None)
        if how == "has failed":
            waits = (f"\n  rank {r} waited in {text}" for r, text in self._waits())
            self.waits_at_failure = self.waits_at_failure or "".join(waits)
            self._stop(f"rank {rank} has failed: {reason}")
        else:
            self._look()

    def _arrive(self, number: int, call: Call) -> None:
        call.value = number
        slot, is_full = self._meetings.arrive(call)
        self._open[call.rank, number] = (call, slot)
        if self._reason:
            self._tell_end(call.rank, number)
        elif is_full:
            self._complete(slot)

    def _complete(self, slot: Slot) -> None:
        calls, verdict = slot.in_order(), ["go"]
        try:
            check_agreement(calls)
        except CollectiveMismatch as error:
            verdict = ["CollectiveMismatch", str(error)]
        for call in calls:
            if self._open.pop((call.rank, call.value), None) is not None:
                self._reply(call.rank, [call.value, *verdict])
            if self._waiting.get(call.rank, (None,))[0] is call:
                del self._waiting[call.rank]

    def _look(self, *, is_hasty: bool = True) -> None:
        """Whether some ranks wait in vain. In haste only where none is at work, who might soon
        be found to wait as well."""
        able = set(range(self._world_size)) - set(self._waiting) - set(self._ended)
        at_work, before = sorted(able), -1
        while len(able) > before:
            before = len(able)
            able |= {r for r, (c, s) in self._waiting.items() if able.issuperset(missing(c, s))}
        if self._reason or able.issuperset(self._waiting) or (is_hasty and at_work):
            return
        others = {**self._ended, **dict.fromkeys(at_work, "is at work")}
        found = deadlock(self._waits(), others, self._meetings.conflicts())
        self.deadlock_text = str(found)
        self._untold = set(range(self._world_size))
        self._stop(self.deadlock_text)

    def _stop(self, reason: str) -> None:
        self._reason = self._reason or reason
        waiting = {call.rank: call.value for call, _ in self._waiting.values()}
        for rank, number in [*waiting.items(), *self._open]:
            self._tell_end(rank, number)
        self._waiting.clear()

    def _tell_end(self, rank: int, number: int) -> None:
        """A deadlock once to each rank; to those who go on regardless, that they are released."""
        if self._open.pop((rank, number), None) is not None:
            kind = "Deadlock" if rank in self._untold else "Released"
            self._untold.discard(rank)
            self._reply(rank, [number, kind, self._reason])

    def _waits(self) -> list[tuple[int, str]]:
        return [(r, describe_wait(*self._waiting[r])) for r in sorted(self._waiting)]


class Switchboard:
    """A referee's lines to all ranks: JSON, one message a line, never blocking."""

    def __init__(self, lines: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
        self.referee = Referee(len(lines), self._reply)
        self.num_open = len(lines)
        self._lines, self._selector = lines, selector
        self._received = {rank: b"" for rank in lines}
        self._unsent = {rank: b"" for rank in lines}
        for rank, line in lines.items():
            line.setblocking(False)
            selector.register(line, selectors.EVENT_READ, partial(self._on_event, rank))

    def _on_event(self, rank: int, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._send(rank)
        if mask & selectors.EVENT_READ:
            self._read(rank)

    def _read(self, rank: int) -> None:
        try:
            chunk = self._lines[rank].recv(1 << 16)
        except ConnectionError:
            chunk = b""
        if not chunk:
            self._selector.unregister(self._lines[rank])
            self._lines[rank].close()
            self.num_open -= 1
            self.referee.end(rank, "has died")
            return
        *messages, self._received[rank] = (self._received[rank] + chunk).split(b"\n")
        for message in messages:
            self.referee.hear(rank, json.loads(message))

    def _reply(self, rank: int, message: list[Any]) -> None:
        self._unsent[rank] += json.dumps(message).encode() + b"\n"
        self._send(rank)

    def _send(self, rank: int) -> None:
        line = self._lines[rank]
        try:
            self._unsent[rank] = self._unsent[rank][line.send(self._unsent[rank]) :]
        except BlockingIOError:
            pass
        except OSError:  # it has gone; reading will find out
            self._unsent[rank] = b""
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent[rank] else 0)
        if self._selector.get_key(line).events != events:
            self._selector.modify(line, events, self._selector.get_key(line).data)
