"""The same programs in processes that somebody else has started.

    torchrun --nproc-per-node 8 train.py

where train.py ends in `with comm_from_environment() as comm: program(comm)`. The backend is NCCL
where there are GPUs, and `comm.device` says which is this rank's. Ledgers count as in simulation;
the clock takes the other ranks to arrive when this one does.

On gloo, where all ranks share a machine, rank 0 forks a referee, as `run` has one: deadlocks and
calls that do not fit are named on each rank. On NCCL, over several machines and in `comm_of` calls
go to the backend as they are, and the word is with its time-out.
"""

import os
import selectors
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.clock import Clock
from reference.parallel.ranks.comm import Comm
from reference.parallel.ranks.control import Control
from reference.parallel.ranks.hardware import DGX_H100, Hardware
from reference.parallel.ranks.membership import Rank
from reference.parallel.ranks.meter import optimizer_states_labelled
from reference.parallel.ranks.process_transport import Processes
from reference.parallel.ranks.program import check_finished
from reference.parallel.ranks.random_streams import seed_everything
from reference.parallel.ranks.referee import Switchboard


@contextmanager
def comm_from_environment(
    *, hardware: Hardware = DGX_H100, seed: int = 0, timeout_seconds: float = 600.0
) -> Iterator[Comm]:
    """The world in a process that torchrun has started; its ledgers are the comm's own.

    Seeds torch, random and numpy with seed + rank. Without torchrun: a world of one rank.
    `timeout_seconds` is how long a rank waits for another. Raises: as the operations of `Comm`;
    Deadlock and CollectiveMismatch on gloo, where all ranks share a machine.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    is_refereed = device.type == "cpu" and 1 < world_size == int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = _fork_referee(folder, world_size) if is_refereed and rank == 0 else ""
        _init_process_group(device, rank, world_size, timeout_seconds)
        try:
            control = _control(path, rank, timeout_seconds) if is_refereed else None
            seed_everything(seed + rank)
            world = Group("world", tuple(range(world_size)))
            transport = Processes(Clock(hardware, [rank]), control)
            with _comm(world, Rank(rank, world_size, hardware, transport, device)) as comm:
                yield comm
        finally:
            dist.destroy_process_group()


@contextmanager
def comm_of(
    group: dist.ProcessGroup | None = None, *, hardware: Hardware = DGX_H100
) -> Iterator[Comm]:
    """A process group of torch.distributed's as a `Comm`: by default, of all ranks.

    For programs that have called `init_process_group` themselves: random streams, devices and the
    group's end stay theirs. Every rank of the group enters.

    Raises: RuntimeError before `init_process_group`; ValueError on a rank outside of the group;
    RuntimeError at the end for handles without `wait`.
    """
    if not dist.is_initialized():
        raise RuntimeError("comm_of: expected a process group; call init_process_group first")
    rank = dist.get_rank()
    ranks = () if group is dist.GroupMember.NON_GROUP_MEMBER else tuple(
        dist.get_process_group_ranks(group)
    )  # fmt: skip
    if rank not in ranks:
        raise ValueError(f"group: expected one to which rank {rank} belongs, got ranks {ranks}")
    backend = dist.get_backend(group)
    device = torch.device("cpu")
    if "nccl" in backend:
        device = torch.device("cuda", torch.cuda.current_device())
    members = Group("world" if group is None else f"group of {len(ranks)}", ranks)
    transport = Processes(Clock(hardware, [rank]))
    transport.adopt(members, dist.group.WORLD if group is None else group)
    with _comm(members, Rank(rank, dist.get_world_size(), hardware, transport, device)) as comm:
        yield comm


@contextmanager
def _comm(group: Group, me: Rank) -> Iterator[Comm]:
    control = me.transport.control if isinstance(me.transport, Processes) else None
    try:
        with optimizer_states_labelled(), me.meter:
            yield Comm(group, me)
        check_finished(me)
    except BaseException as error:
        if control is not None:
            control.end("has failed", f"{type(error).__name__}: {error}")
        raise
    if control is not None:
        control.end("has finished")


def _init_process_group(
    device: torch.device, rank: int, world_size: int, timeout_seconds: float
) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone: dict[str, Any] = {}
    if "MASTER_ADDR" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **alone)


def _fork_referee(folder: str, world_size: int) -> str:
    """The path of a socket at which a process of its own serves, until all ranks have gone."""
    path = os.path.join(folder, "referee")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(world_size)
    if os.fork() == 0:
        try:
            _serve(listener, world_size)
        finally:
            os._exit(0)
    listener.close()
    return path


def _serve(listener: socket.socket, world_size: int) -> None:
    lines: dict[int, socket.socket] = {}
    while len(lines) < world_size:
        line = listener.accept()[0]
        lines[int.from_bytes(line.recv(4), "big")] = line
    with selectors.DefaultSelector() as selector:
        board = Switchboard(lines, selector)
        while board.num_open:
            for key, mask in selector.select():
                key.data(mask)


def _control(path: str, rank: int, timeout_seconds: float) -> Control:
    paths = [path]
    dist.broadcast_object_list(paths, src=0)
    line = socket.socket(socket.AF_UNIX)
    line.connect(paths[0])
    line.sendall(rank.to_bytes(4, "big"))
    dist.barrier()  # the socket's folder goes with rank 0
    return Control(line, timeout_seconds)
