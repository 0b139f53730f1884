"""The simulated machine: one program, run on N ranks, with every byte and FLOP accounted for.

A program is a function whose first argument is the rank's communicator. Each rank runs it from top
to bottom (SPMD) in a thread of its own; one runs at a time, until it must wait for others, so
results are the same each time. Here each rank has two rows of a batch:

    >>> import torch
    >>> from reference.parallel.ranks import run
    >>> def program(comm):
    ...     weight = torch.ones(3, 1, requires_grad=True)
    ...     rows = torch.arange(12.0).view(4, 3).chunk(comm.size)[comm.rank]
    ...     (rows @ weight).mean().backward()
    ...     return comm.all_reduce(weight.grad, "mean").flatten().tolist()
    >>> done = run(2, program)
    >>> done.results
    [[4.5, 5.5, 6.5], [4.5, 5.5, 6.5]]
    >>> done.trace.total(operation="all_reduce", rank=0).wire_bytes
    12.0

run(world_size, program, *args)            simulated ranks, 1 to 512: a Run with .results and .trace
run(..., backend="processes")              the same on forked processes with gloo
with comm_from_environment() as comm:      the same under torchrun, NCCL where there are GPUs
with comm_of(group) as comm:               a process group that you have made already
run(..., shapes_only=True)                 all ranks, tensors with shapes alone: large models
run_one_rank(16384, program, rank=3)       one rank of very many, without values

**Communicator.** `comm.rank`, `size`, `global_rank`, `world_size`, `local_rank`, `node`, `device`.
Ranks named in calls (`src`, `dst`) count within the group. In place, returning the tensor:
`all_reduce(x, "sum")`, `broadcast(x, src)`, `reduce(x, dst)`, `scatter(out, x, src=)`,
`recv(x, src)`. New tensor, or `out=`: `all_gather(x)`, `reduce_scatter(x)`, `all_to_all(x)`,
`gather(x, dst)`; they concatenate and divide along dimension 0. `send(x, dst)`, `isend`, `irecv`,
`barrier()`. With `async_op=True` (and for isend, irecv) a `Handle` comes back: its result is there
after `wait()`, never before; a program that forgets to wait is told so at its end, and one that
writes to the tensors meanwhile by `wait()`. Collectives are not differentiable: write a
torch.autograd.Function around them.

**Groups.** `comm.split(color, key)`; `mesh = comm.mesh(dp=2, tp=4)`, the last axis running fastest,
then `mesh.tp`, `mesh["dp", "tp"]`, `mesh.coordinates`, `mesh.rank_at(tp=0)`: each group a `Comm`.

**Ledgers.** In the program: `comm.traffic.total(operation=...)`, `.reset()`; `comm.memory.use` with
`current`, `peak`, `peak_bytes`, `.reset_peak()`, `.label(tensors, "gradients")`;
`comm.now_seconds`. After the run, on `done.trace`: `traffic()`, `traffic_matrix()`,
`total(rank=, group=, operation=)`; `memory()`, `memory_samples(rank)`; `timeline()`, `seconds`,
`busy_seconds(rank)`, `idle_fraction(rank)`;
`to_perfetto(path)`. Time is virtual, of a `Hardware`: matrix products take FLOPs / peak, messages
latency + bytes / bandwidth. `comm.compute(flops)` adds work, `with comm.region("F0")` names it.

**When it goes wrong.** Deadlock and CollectiveMismatch name each rank, its call and the program's
line, and are raised on every rank that waits; so is what a reduction itself raises. Who catches a
mismatch goes on. What a program raises comes out as it is, with a note that says on which rank, and
the others are released. Processes with gloo hear the same, within two seconds, from a referee.

calls, source  what a rank says, its line      collectives   what operations mean
scheduler      the baton, deadlocks             reductions    which dtypes, and how
meetings       where calls meet                 transport     what then happens: simulated
comm           operations, handles              in_flight     writes before `wait`
membership     ranks, splits, meshes            ledger, cost  traffic in closed form
memory, meter  what storages are alive, FLOPs   clock         streams and events
offload        copies to the host               hardware      A100 and H100 nodes
launch         run, run_one_rank                trace         what a run leaves behind
processes      forked ranks, with gloo          starters      calls of torch.distributed
referee        who may go on, between processes control       a rank's line to it
from_environment  torchrun, NCCL, comm_of
"""

from reference.parallel.ranks.calls import Group
from reference.parallel.ranks.clock import Event
from reference.parallel.ranks.collectives import CollectiveMismatch
from reference.parallel.ranks.comm import Comm, Handle
from reference.parallel.ranks.from_environment import comm_from_environment, comm_of
from reference.parallel.ranks.hardware import CLASSROOM, DGX_A100, DGX_H100, Hardware, Link
from reference.parallel.ranks.launch import Run, run, run_one_rank
from reference.parallel.ranks.ledger import TrafficRow
from reference.parallel.ranks.membership import Mesh
from reference.parallel.ranks.memory import CATEGORIES, MemorySample, MemoryUse
from reference.parallel.ranks.offload import to_device, to_host
from reference.parallel.ranks.reductions import REDUCTIONS
from reference.parallel.ranks.scheduler import Deadlock
from reference.parallel.ranks.trace import Trace

__all__ = [
    "CATEGORIES",
    "CLASSROOM",
    "DGX_A100",
    "DGX_H100",
    "REDUCTIONS",
    "CollectiveMismatch",
    "Comm",
    "Deadlock",
    "Event",
    "Group",
    "Handle",
    "Hardware",
    "Link",
    "MemorySample",
    "MemoryUse",
    "Mesh",
    "Run",
    "Trace",
    "TrafficRow",
    "comm_from_environment",
    "comm_of",
    "run",
    "run_one_rank",
    "to_device",
    "to_host",
]
