"""What real processes hear of deadlocks, calls that do not fit and early ends: as in simulation.

Each within two seconds, on every rank, in the words that simulated ranks use.
"""

import os
import signal
import time

import pytest
import torch

from reference.parallel.ranks import CollectiveMismatch, Deadlock, run

NAMED_WITHIN_SECONDS = 2.0


def shape(comm):
    comm.all_reduce(torch.ones(2 + comm.rank))


def operation(comm):
    comm.all_reduce(torch.ones(2)) if comm.rank else comm.barrier()


def dtype(comm):
    comm.broadcast(torch.ones(2, dtype=torch.int64 if comm.rank else torch.float64), 0)


def device(comm):
    comm.all_gather(torch.ones(2, device="meta" if comm.rank else "cpu"))


def rows(comm):
    comm.all_to_all(torch.ones(4), input_splits=[2, 2], output_splits=[2 - comm.rank, 2])


def message(comm):
    comm.recv(torch.empty(3), 0) if comm.rank else comm.send(torch.ones(2), 1)


MISMATCHES = (shape, operation, dtype, device, rows, message)


def mismatches(comm):
    """One after the other: who catches one goes on, and the next collective is right."""
    texts = []
    for call in MISMATCHES:
        try:
            call(comm)
        except CollectiveMismatch as error:
            texts.append(str(error))
        texts.append(comm.all_reduce(torch.ones(1)).item())
    handle = comm.all_reduce(torch.ones(1 + comm.rank), async_op=True)
    total = comm.all_reduce(torch.ones(1)).item()
    with pytest.raises(CollectiveMismatch):
        handle.wait()
    return [*texts, total]


def test_matches_simulation_where_calls_do_not_fit():
    simulated = run(2, mismatches).results
    assert run(2, mismatches, backend="processes").results == simulated
    assert simulated[0] == simulated[1]
    for call, text in zip(MISMATCHES, simulated[0][::2], strict=False):
        assert f"the ranks disagree about the {call.__name__}" in text or call is message


def leaves_early(comm):
    if comm.rank:
        comm.all_reduce(torch.ones(2, 3))


def face_each_other(comm):
    comm.send(torch.ones(1), 1 - comm.rank)
    comm.recv(torch.empty(1), 1 - comm.rank)


def other_order(comm):
    groups = [comm.split(0, name="rows"), comm.split(0, name="columns")]
    for group in groups[:: 1 - 2 * comm.rank]:
        group.barrier()


def other_tag(comm):
    x = torch.ones(1)
    comm.recv(x, 0, tag=7) if comm.rank else comm.send(x, 1, tag=8)


@pytest.mark.parametrize("program", [leaves_early, face_each_other, other_order, other_tag])
def test_matches_simulations_deadlock(program):
    with pytest.raises(Deadlock) as simulated:
        run(2, program)
    started = time.monotonic()
    with pytest.raises(Deadlock) as named:
        run(2, program, backend="processes")
    assert time.monotonic() - started < NAMED_WITHIN_SECONDS
    assert str(named.value) == str(simulated.value)


@pytest.mark.parametrize("backend", ["simulated", "processes"])
def test_a_deadlock_is_raised_on_each_rank_that_waits(backend, tmp_path):
    def program(comm):
        try:
            comm.all_reduce(torch.ones(comm.size)) if comm.rank else None
        except Deadlock as error:
            (tmp_path / str(comm.rank)).write_text(str(error))

    with pytest.raises(Deadlock) as caught:
        run(3, program, backend=backend)
    texts = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert texts == [str(caught.value)] * 2


@pytest.mark.parametrize("backend", ["simulated", "processes"])
def test_an_error_of_one_ranks_own_unwinds_the_others(backend, tmp_path):
    """`except Exception` does not see it, `finally` does; the words say where others waited."""

    def program(comm):
        comm.barrier()
        if comm.rank == 1:
            time.sleep(0.3)
            raise LookupError("no such shard")
        try:
            comm.barrier()
        except Exception:
            (tmp_path / f"caught {comm.rank}").touch()
        finally:
            (tmp_path / str(comm.rank)).touch()

    with pytest.raises(LookupError, match="no such shard") as caught:
        run(3, program, backend=backend)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]
    notes = "\n".join(caught.value.__notes__)
    assert "raised in rank 1 of 3" in notes and "rank 2 waited in group 'world'" in notes


def test_a_rank_that_died_is_named_at_once():
    def program(comm):
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.barrier()

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the process of rank 1 has died"):
        run(2, program, backend="processes")
    assert time.monotonic() - started < NAMED_WITHIN_SECONDS


def test_says_who_is_still_at_work():
    """Rank 2 computes; rank 0 waits for rank 1, which has finished: no need to wait for rank 2."""

    def program(comm):
        if comm.rank == 2:
            time.sleep(20)
        if comm.rank == 0:
            comm.recv(torch.empty(1), 1)

    with pytest.raises(Deadlock, match="rank 1 has finished\n  rank 2 is at work"):
        run(3, program, backend="processes")


def test_rejects_waiting_longer_than_the_time_limit():
    def program(comm):
        if comm.rank:
            time.sleep(10)
        comm.barrier()

    with pytest.raises(TimeoutError, match="for ranks that are at work elsewhere, in barrier"):
        run(2, program, backend="processes", timeout_seconds=0.5)


def test_rejects_a_time_limit_for_simulated_ranks():
    with pytest.raises(ValueError, match="timeout_seconds: expected processes"):
        run(2, lambda comm: None, timeout_seconds=1.0)


def test_operations_under_way_do_not_hold_each_other_up():
    """Each rank waits first for what it started last, in groups that cross."""

    def program(comm):
        mesh = comm.mesh(dp=2, tp=2)
        x = torch.full((3,), float(comm.rank))
        handles = [g.all_reduce(x.clone(), async_op=True) for g in (mesh.dp, mesh.tp, comm)]
        if comm.rank == 0:
            comm.send(x, 3)
        elif comm.rank == 3:
            comm.recv(x.clone(), 0)
        order = handles if comm.rank % 2 else handles[::-1]
        for handle in order:
            handle.wait()
        return [handle.wait().tolist() for handle in handles]

    processes = run(4, program, backend="processes").results
    assert processes == run(4, program).results


def test_messages_in_a_ring_with_others_under_way():
    """Each rank waits for one message while it owes another; who only asks is told as well."""

    def program(comm):
        here, after, before = comm.rank, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        got = [torch.empty(1) for _ in range(4)]
        for i in range(0, 4, 2):
            sends = [comm.isend(torch.ones(1) * (here + j), after, tag=j) for j in (i, i + 1)]
            late, early = (comm.irecv(got[j], before, tag=j) for j in (i + 1, i))
            late.wait()
            while not early.is_completed():
                pass
            for handle in (early, *sends):
                handle.wait()
        return [x.item() for x in got]

    assert run(3, program, backend="processes").results == run(3, program).results


def test_many_operations_under_way():
    """More answers than a socket holds, while nobody listens."""

    def program(comm):
        xs = [torch.full((1,), float(i)) for i in range(400)]
        handles = [comm.all_reduce(x, async_op=True) for x in xs]
        time.sleep(0.2 * comm.rank)
        return sum(handle.wait().item() for handle in handles)

    assert run(2, program, backend="processes").results == [2 * sum(range(400))] * 2
