"""The same programs on real processes: forked here with gloo, or started by torchrun.

    torchrun --nproc-per-node 8 train.py

where train.py ends in `with comm_from_environment() as comm: program(comm)`. The backend is NCCL
where there are GPUs, and `comm.device` says which is this rank's. Ledgers count as in simulation;
the clock takes the other ranks to arrive when this one does.

Forking takes milliseconds where a fresh interpreter takes seconds, but CUDA does not survive it:
use torchrun there.
"""

import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.comm import Comm
from reference.parallel.ranks.hardware import DGX_H100, Hardware
from reference.parallel.ranks.membership import Rank
from reference.parallel.ranks.meter import optimizer_states_labelled
from reference.parallel.ranks.process_transport import Processes
from reference.parallel.ranks.program import Program, check_finished, run_program
from reference.parallel.ranks.random_streams import seed_everything
from reference.parallel.ranks.trace import RankTrace

Ended = tuple[Any, RankTrace]


@contextmanager
def comm_from_environment(
    *, hardware: Hardware = DGX_H100, seed: int = 0, timeout_seconds: float = 600.0
) -> Iterator[Comm]:
    """The world in a process that torchrun has started; its ledgers are the comm's own.

    Seeds torch, random and numpy with seed + rank. Without torchrun: a world of one rank.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=rank, world_size=world_size, timeout=timeout
        )
    try:
        seed_everything(seed + rank)
        world = Group("world", tuple(range(world_size)))
        me = Rank(rank, world_size, hardware, Processes(Clock(hardware, [rank])), device)
        with optimizer_states_labelled(), me.meter:
            yield Comm(world, me)
        check_finished(me)
    finally:
        dist.destroy_process_group()


def run_processes(
    world_size: int,
    program: Program,
    args: tuple[Any, ...],
    hardware: Hardware,
    seed: int,
    is_measured: bool,
    timeout_seconds: float,
) -> list[Ended]:
    """Fork a process for each rank; what each returned, in rank order.

    Raises: what the program raises on the first rank that fails, with its traceback in a note.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("backend: CUDA is in use and does not survive a fork; use torchrun")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        world = Group("world", tuple(range(world_size)))
        pipes, processes = [], []
        for rank in world.ranks:
            receiver, sender = context.Pipe(duplex=False)
            me = Rank(rank, world_size, hardware, Processes(Clock(hardware, [rank])))
            job = (sender, os.path.join(folder, "store"), me, world, program, args)
            options = (seed, is_measured, timeout_seconds)
            processes.append(context.Process(target=_child, args=(*job, *options), daemon=True))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.join(timeout=0 if process.is_alive() else None)
                process.kill()
                process.join()
                process.close()


def _child(
    sender: Any,
    store: str,
    me: Rank,
    world: Group,
    program: Program,
    args: tuple[Any, ...],
    seed: int,
    is_measured: bool,
    timeout_seconds: float,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world.size),
            rank=me.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        seed_everything(seed + me.rank)
        with optimizer_states_labelled():
            ended = run_program(program, args, world, me, is_measured=is_measured)
        message = _pickled((True, ended))
    except BaseException as error:
        error.add_note(f"raised in rank {me.rank} of {world.size}\n{traceback.format_exc()}")
        message = _pickled((False, (time.monotonic(), error)))
    sender.send_bytes(message)
    sender.close()
    # Peers may still be reading from this process; the parent ends it when all have spoken.
    time.sleep(timeout_seconds)


def _collect(pipes: list[Any]) -> list[Ended]:
    ended: dict[int, Ended] = {}
    while len(ended) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in ended]
        failures: list[tuple[float, BaseException]] = []
        for pipe in multiprocessing.connection.wait(waiting):
            rank = pipes.index(pipe)
            try:
                is_good, content = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                is_good = False
                content = time.monotonic(), RuntimeError(f"the process of rank {rank} has died")
            if is_good:
                ended[rank] = content
            else:
                failures.append(content)
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
    return [ended[rank] for rank in range(len(pipes))]


def _pickled(message: Any) -> bytes:
    """A message whose tensors travel by value; an exception that cannot be pickled by its words."""
    buffer = io.BytesIO()
    try:
        pickle.dump(message, buffer)
        return buffer.getvalue()
    except Exception as failure:
        is_good, content = message
        if not is_good:
            when, error = content
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            plain.__notes__ = error.__notes__
            return pickle.dumps((False, (when, plain)))
        error = TypeError(f"a result cannot be sent from its process: {failure}")
        return pickle.dumps((False, (time.monotonic(), error)))
