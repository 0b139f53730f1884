"""A `Comm` on process groups that the program has made itself. Oracle: torch.distributed."""

import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from reference.parallel.ranks import comm_of


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", 3),
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=20),
    )
    pair = dist.new_group([0, 2])
    mine = torch.arange(4.0) + rank
    with comm_of() as comm:
        assert (comm.rank, comm.size, comm.world_size) == (rank, 3, 3)
        ours, theirs = comm.all_reduce(mine.clone()), mine.clone()
        dist.all_reduce(theirs)
        assert torch.equal(ours, theirs)
        parts = [torch.empty(4) for _ in range(3)]
        dist.all_gather(parts, mine)
        assert torch.equal(comm.all_gather(mine), torch.cat(parts))
        assert comm.traffic.total(operation="all_gather").payload_bytes == 48
        half = comm.split(rank % 2)
        assert half.all_reduce(torch.ones(1)).item() == half.size
    if rank == 1:
        with pytest.raises(ValueError, match="expected one to which rank 1 belongs"):
            comm_of(pair).__enter__()
    else:
        with comm_of(pair) as comm:
            assert (comm.rank, comm.size, comm.global_rank) == (rank // 2, 2, rank)
            ours, theirs = comm.all_reduce(mine.clone(), "mean"), mine.clone()
            dist.all_reduce(theirs, group=pair)
            assert torch.equal(ours, theirs / 2)
            assert comm.broadcast(mine.clone(), 1).tolist() == [2.0, 3.0, 4.0, 5.0]
        with pytest.raises(RuntimeError, match=r"without wait\(\)"):
            with comm_of(pair) as comm:
                comm.all_reduce(mine, async_op=True)
    assert dist.is_initialized()  # its end is the program's
    dist.barrier()
    dist.destroy_process_group()


def test_matches_torch_distributed_on_the_default_group_and_a_sub_group(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=on_rank, args=(rank, str(tmp_path))) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=30)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]


def test_rejects_a_program_without_process_groups():
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        comm_of().__enter__()
