"""The same programs on forked processes with gloo, a referee between them.

Forking takes milliseconds where a fresh interpreter takes seconds, but CUDA does not survive it:
use torchrun there (`from_environment`). The parent is the referee and collects the results.
"""

import gc
import io
import multiprocessing
import os
import pickle
import selectors
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.control import Control
from reference.parallel.ranks.hardware import Hardware
from reference.parallel.ranks.membership import Rank
from reference.parallel.ranks.meter import optimizer_states_labelled
from reference.parallel.ranks.process_transport import Processes
from reference.parallel.ranks.program import Program, run_program
from reference.parallel.ranks.random_streams import seed_everything
from reference.parallel.ranks.referee import Switchboard
from reference.parallel.ranks.scheduler import Deadlock, Released
from reference.parallel.ranks.trace import RankTrace

Ended = tuple[Any, RankTrace]
# After one rank has failed, for the others to be told and to unwind.
GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What all processes of a run share."""

    program: Program
    args: tuple[Any, ...]
    hardware: Hardware
    seed: int
    is_measured: bool
    timeout_seconds: float


def run_processes(world_size: int, job: Job) -> list[Ended]:
    """Fork a process for each rank; what each returned, in rank order.

    Raises: what the program raises on the first rank that fails, with its traceback in a note.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("backend: CUDA is in use and does not survive a fork; use torchrun")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, lines, processes = [], [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            line, theirs = socket.socketpair()
            args = (rank, world_size, os.path.join(folder, "store"), job, sender, theirs)
            processes.append(context.Process(target=_child, args=args, daemon=True))
            processes[-1].start()
            sender.close()
            theirs.close()
            pipes.append(receiver)
            lines.append(line)
        try:
            return Collector(pipes, lines).collect()
        finally:
            for process in processes:
                process.join(timeout=0 if process.is_alive() else None)
                process.kill()
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()
            for line in lines:
                line.close()


def _child(
    rank: int, world_size: int, store: str, job: Job, sender: Any, line: socket.socket
) -> None:
    torch.set_num_threads(1)
    # What the parent has left for the collector may want threads to end that a fork did not take.
    gc.freeze()
    control = Control(line, job.timeout_seconds)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=job.timeout_seconds),
        )
        transport = Processes(Clock(job.hardware, [rank]), control)
        me = Rank(rank, world_size, job.hardware, transport)
        world = Group("world", tuple(range(world_size)))
        seed_everything(job.seed + rank)
        with optimizer_states_labelled():
            ended = run_program(job.program, job.args, world, me, is_measured=job.is_measured)
        message = _serialized(("ended", time.monotonic(), ended))
        control.end("has finished")
    except BaseException as error:
        error.add_note(f"raised in rank {rank} of {world_size}\n{traceback.format_exc()}")
        kind = "released" if isinstance(error, Released) else "failed"
        message = _serialized((kind, time.monotonic(), error))
        control.end("has failed", f"{type(error).__name__}: {error}")
    sender.send_bytes(message)
    sender.close()
    # Peers may still be reading from this process; the parent ends it when all have spoken.
    time.sleep(job.timeout_seconds)


@dataclass
class Collector:
    """The parent's part: the referee, and what the ranks return or raise."""

    pipes: Sequence[Any]
    lines: Sequence[socket.socket]
    ended: dict[int, Ended] = field(default_factory=dict)
    failures: list[tuple[float, BaseException]] = field(default_factory=list)
    num_released: int = 0

    def collect(self) -> list[Ended]:
        """Until all ranks have spoken or, after a failure, for a moment longer."""
        with selectors.DefaultSelector() as selector:
            referee = Switchboard(dict(enumerate(self.lines)), selector).referee
            for rank, pipe in enumerate(self.pipes):
                listen = partial(self._on_result, rank, selector)
                selector.register(pipe, selectors.EVENT_READ, listen)
            deadline = None
            while len(self.ended) + len(self.failures) + self.num_released < len(self.pipes):
                if deadline is None and (self.failures or referee.deadlock_text):
                    deadline = time.monotonic() + GRACE_SECONDS
                seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
                events = selector.select(seconds)
                if not events and seconds is not None:
                    break
                for key, mask in events:
                    key.data(mask)
        if self.failures:
            failure = min(self.failures, key=lambda failure: failure[0])[1]
            if referee.waits_at_failure and not isinstance(failure, Deadlock):
                failure.add_note(referee.waits_at_failure.removeprefix("\n"))
            raise failure
        if referee.deadlock_text:
            raise Deadlock(referee.deadlock_text)
        return [self.ended[rank] for rank in range(len(self.pipes))]

    def _on_result(self, rank: int, selector: selectors.BaseSelector, mask: int) -> None:
        pipe = self.pipes[rank]
        selector.unregister(pipe)
        try:
            kind, seconds, content = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except EOFError:
            # Before all else: what it does to the others is not the cause.
            died = RuntimeError(f"the process of rank {rank} has died")
            kind, seconds, content = "failed", 0.0, died
        if kind == "ended":
            self.ended[rank] = content
        elif kind == "failed":
            self.failures.append((seconds, content))
        else:
            self.num_released += 1


def _serialized(message: tuple[str, float, Any]) -> bytes:
    """A message whose tensors travel by value; an exception that cannot be pickled by its words."""
    buffer = io.BytesIO()
    try:
        torch.save(message, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        return buffer.getvalue()
    except Exception as failure:
        kind, seconds, content = message
        if kind == "ended":
            content = TypeError(f"a result cannot be sent from its process: {failure}")
        else:
            plain = RuntimeError(f"{type(content).__name__}: {content}")
            plain.__notes__ = content.__notes__
            content = plain
        buffer = io.BytesIO()
        torch.save(("failed", seconds, content), buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        return buffer.getvalue()
