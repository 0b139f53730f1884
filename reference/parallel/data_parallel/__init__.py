"""Data parallelism: the same model on all ranks, other rows on each.

    ddp = DDP(module, comm)                     all_reduce out of send and recv:
    for batch in ...:                               total = ring_all_reduce(comm, tensor)
        optimizer.zero_grad()
        loss_of(ddp, rows_of(batch)).backward()     # .grad is the mean over ranks
        optimizer.step()

Where ranks or micro-batches have different numbers of counted tokens the loss is a share of one
mean: token_mean(targets, comm, averaged_by=comm.size).share(losses, targets).

all_reduce    star, tree, ring, gossip from messages, and what each costs
buckets       which gradients travel together
ddp           hooks, buckets, overlap, no_sync, unused parameters, buffers
graph         which parameters a result depends on
token_mean    one mean over all tokens that count, whoever holds them
batch_norm    statistics over the rows of all ranks
uneven        ranks that run out of data
one_process   nn.DataParallel, told as messages
sampler       which rows a rank takes
transparent   wrapped parameters keep their names
restart       from a checkpoint, with another number of ranks

Letters: N ranks, B bytes of a tensor (rows of a batch where it says so).
"""

from reference.parallel.data_parallel.all_reduce import (
    ALGORITHMS,
    AllReduceCost,
    all_reduce_cost,
    gossip_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    star_all_reduce,
    tree_all_reduce,
)
from reference.parallel.data_parallel.batch_norm import SyncBatchNorm, convert
from reference.parallel.data_parallel.buckets import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    divide,
    num_bytes,
)
from reference.parallel.data_parallel.ddp import DDP
from reference.parallel.data_parallel.graph import reached_leaves
from reference.parallel.data_parallel.one_process import data_parallel_step
from reference.parallel.data_parallel.restart import (
    Restarted,
    load_replica,
    run_with_restarts,
    save_replica,
)
from reference.parallel.data_parallel.sampler import rows_of_rank, rows_of_step
from reference.parallel.data_parallel.token_mean import TokenMean, token_mean
from reference.parallel.data_parallel.transparent import Transparent, check_learning
from reference.parallel.data_parallel.uneven import uneven

__all__ = [
    "ALGORITHMS",
    "BUCKET_BYTES",
    "DDP",
    "FIRST_BUCKET_BYTES",
    "AllReduceCost",
    "Restarted",
    "SyncBatchNorm",
    "TokenMean",
    "Transparent",
    "all_reduce_cost",
    "check_learning",
    "convert",
    "data_parallel_step",
    "divide",
    "gossip_all_reduce",
    "load_replica",
    "num_bytes",
    "reached_leaves",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_reduce_scatter",
    "rows_of_rank",
    "rows_of_step",
    "run_with_restarts",
    "save_replica",
    "star_all_reduce",
    "token_mean",
    "tree_all_reduce",
    "uneven",
]
