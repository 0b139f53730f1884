"""What happens when ranks wait for what never comes, raise, or leave; and what each rank keeps."""

import gc
import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from reference.parallel.ranks import CollectiveMismatch, Deadlock, run

PROGRAM = os.path.basename(__file__)


def num_rank_threads():
    return sum(thread.name.startswith("rank ") for thread in threading.enumerate())


class TestDeadlockDoctor:
    def test_names_each_rank_its_call_and_its_line(self):
        def program(comm):
            if comm.rank != 2:
                comm.all_reduce(torch.ones(2, 3))

        with pytest.raises(Deadlock) as caught:
            run(3, program)
        text = str(caught.value)
        assert text.startswith("no rank can go on")
        for rank in (0, 1):
            assert f"rank {rank} waits in group 'world', collective 0: all_reduce(sum)" in text
        assert "of (2, 3) float32" in text
        assert "2 of 3 have come, missing: 2" in text and "rank 2 has finished" in text
        assert f"{PROGRAM}:" in text and "comm.all_reduce(torch.ones(2, 3))" in text

    def test_sees_two_sends_that_face_each_other(self):
        """Send waits until it is received: the classic, legal only while buffers last."""

        def program(comm):
            comm.send(torch.ones(1), 1 - comm.rank)
            comm.recv(torch.empty(1), 1 - comm.rank)

        with pytest.raises(Deadlock, match="rank 0 waits in .*send to rank 1(.|\n)*rank 1 waits"):
            run(2, program)

    def test_sees_a_message_nobody_sends(self):
        with pytest.raises(Deadlock, match="recv from rank 0 with tag 7 of"):
            run(2, lambda c: c.rank and c.recv(torch.empty(1), 0, tag=7))

    def test_sees_collectives_in_another_order_on_two_groups(self):
        def program(comm):
            rows = comm.split(0, name="rows")
            columns = comm.split(0, name="columns")
            first, second = (rows, columns) if comm.rank else (columns, rows)
            first.barrier()
            second.barrier()

        with pytest.raises(Deadlock, match="'columns'(.|\n)*'rows'"):
            run(2, program)

    def test_says_where_those_that_came_disagree(self):
        """Rank 2 is missing, but ranks 0 and 1 already do not fit: the likelier cause."""

        def program(comm):
            if comm.rank == 0:
                comm.all_reduce(torch.ones(2))
            elif comm.rank == 1:
                comm.all_reduce(torch.ones(3))

        with pytest.raises(Deadlock, match="the ranks that came disagree about the shape"):
            run(3, program)

    def test_a_subset_that_calls_the_world(self):
        """Only rank 0 logs a mean loss: the famous `if rank == 0`."""

        def program(comm):
            loss = torch.tensor(float(comm.rank))
            for _ in range(2):
                comm.all_reduce(loss)
                if comm.rank == 0:
                    comm.all_reduce(loss.clone(), "mean")

        with pytest.raises(CollectiveMismatch, match="disagree about the reduction"):
            run(2, program)

    @pytest.mark.parametrize("world_size", [2, 16, 64])
    def test_leaves_no_thread_behind(self, world_size):
        with pytest.raises(Deadlock):
            run(world_size, lambda comm: comm.rank and comm.barrier())
        assert num_rank_threads() == 0


class TestFailures:
    def test_an_error_comes_out_as_it_is_with_its_rank_and_traceback(self):
        def train(comm):
            comm.barrier()
            if comm.rank == 1:
                raise ZeroDivisionError("loss scale")
            comm.all_reduce(torch.ones(2))

        with pytest.raises(ZeroDivisionError, match="loss scale") as caught:
            run(3, train)
        notes = "\n".join(caught.value.__notes__)
        assert "raised in rank 1 of 3" in notes
        assert "rank 0 waited in group 'world', collective 1: all_reduce(sum) of (2,)" in notes
        names = [entry.name for entry in caught.traceback]
        assert names[-1] == "train" and num_rank_threads() == 0

    def test_an_error_in_a_backward_hook(self):
        def program(comm):
            weight = nn.Parameter(torch.ones(2))

            def hook(_):
                if comm.rank == 1:
                    raise KeyError("hook")
                comm.all_reduce(weight.grad)

            weight.register_post_accumulate_grad_hook(hook)
            weight.sum().backward()

        with pytest.raises(KeyError, match="hook"):
            run(2, program)

    def test_a_rank_cannot_swallow_its_release(self):
        """`except Exception` around a collective must not keep a rank alive after another's end."""

        def program(comm):
            if comm.rank == 0:
                raise ValueError("first")
            while True:
                try:
                    comm.barrier()
                except Exception:
                    pass

        with pytest.raises(ValueError, match="first"):
            run(2, program)

    def test_exit_in_a_rank(self):
        with pytest.raises(SystemExit):
            run(2, lambda comm: exit(3) if comm.rank else comm.barrier())

    def test_ranks_may_leave_early_when_nobody_needs_them(self):
        def program(comm):
            half = comm.split(0 if comm.rank < 2 else None)
            if half is None:
                return "left"
            return [half.all_reduce(torch.ones(1)).item() for _ in range(3)]

        assert run(4, program).results == [[2.0, 2.0, 2.0]] * 2 + ["left"] * 2

    def test_the_next_run_starts_afresh(self):
        for _ in range(3):
            with pytest.raises(Deadlock):
                run(2, lambda comm: comm.rank or comm.barrier())
            assert run(2, lambda comm: comm.all_reduce(torch.ones(1)).item()).results == [2, 2]

    @pytest.mark.parametrize("world_size", [0, -1, 513])
    def test_rejects_world_size(self, world_size):
        with pytest.raises(ValueError, match="world_size: expected 1 to 512"):
            run(world_size, lambda comm: None)

    def test_rejects_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend: expected"):
            run(2, lambda comm: None, backend="mpi")


class TestRandomStreams:
    def test_each_rank_draws_what_it_would_draw_alone(self):
        """The global generators, although ranks take turns in between."""

        def draws(comm):
            found = []
            for _ in range(3):
                if comm is not None:
                    comm.barrier()
                found.append((torch.rand(()).item(), random.random(), np.random.rand()))
            return found

        results = run(4, draws, seed=11).results
        for rank, result in enumerate(results):
            torch.manual_seed(11 + rank)
            random.seed(11 + rank)
            np.random.seed(11 + rank)
            assert result == draws(None)
        assert len({r[0][0] for r in results}) == 4

    def test_the_callers_streams_are_left_alone(self):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        expected = torch.rand(3), random.random(), np.random.rand()
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        run(3, lambda comm: (torch.rand(9), random.random(), np.random.rand(), comm.barrier()))
        assert torch.equal(torch.rand(3), expected[0])
        assert (random.random(), np.random.rand()) == expected[1:]

    def test_dropout_is_the_same_on_each_run(self):
        def program(comm):
            x = torch.nn.functional.dropout(torch.ones(16), 0.5)
            return comm.all_reduce(x)

        first, second = run(3, program).results, run(3, program).results
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestTurns:
    def test_order_is_the_same_each_time(self):
        def order():
            seen = []

            def program(comm):
                for i in range(3):
                    seen.append((comm.rank, i))
                    comm.barrier()

            run(5, program)
            return seen

        assert order() == order()

    def test_grad_mode_is_the_callers(self):
        with torch.no_grad():
            assert run(2, lambda comm: torch.is_grad_enabled()).results == [False, False]
        assert run(2, lambda comm: torch.is_grad_enabled()).results == [True, True]

    def test_backward_hooks_may_wait(self):
        """Ranks interleave in the middle of backward; each keeps its own graph."""

        def program(comm):
            def reduce_gradient(p):
                comm.all_reduce(p.grad)

            model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)])
            for p in model.parameters():
                p.data.fill_(0.5)
                p.register_post_accumulate_grad_hook(reduce_gradient)
            model(torch.full((1, 3), float(comm.rank + 1))).sum().backward()
            return [p.grad for p in model.parameters()]

        whole = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(4)])
        for p in whole.parameters():
            p.data.fill_(0.5)
        whole(torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3])).sum().backward()
        for result in run(3, program).results:
            for ours, p in zip(result, whole.parameters(), strict=True):
                torch.testing.assert_close(ours, p.grad)

    def test_thousands_of_steps_do_not_grow(self):
        """Slots, events and handles are dropped: the fourth thousand leaves no object behind."""

        def program(comm, counts):
            for step in range(4100):
                handle = comm.all_reduce(torch.ones(8), async_op=True)
                if comm.rank == 0:
                    comm.send(torch.ones(1), 1)
                else:
                    comm.recv(torch.empty(1), 0)
                handle.wait()
                if comm.rank == 0 and step in (3000, 4000):
                    gc.collect()
                    counts.append(len(gc.get_objects()))

        counts = []
        run(2, program, counts)
        assert counts[1] - counts[0] < 100, counts

    def test_threads_do_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(8, lambda comm: comm.all_reduce(torch.ones(3)))
