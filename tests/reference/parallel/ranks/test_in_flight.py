"""Tensors of operations under way: a write before `wait` is named, on both backends."""

import pytest
import torch

from reference.parallel.ranks import run, run_one_rank

BACKENDS = ["simulated", "processes"]


def told(comm, start, write):
    """What a rank hears that writes between an operation's start and its `wait`."""
    handle = start(comm)
    write()
    try:
        handle.wait()
    except RuntimeError as error:
        return str(error)
    return None


def cases(comm):
    """What is written to, and how: True where it is refused. Who catches that goes on."""
    here, there = comm.rank, 1 - comm.rank
    x, y, whole = torch.ones(4), torch.ones(4), torch.ones(2, 4)
    grid, parts = torch.ones(4, 4), torch.ones(8)

    def message(tensor):
        def start(comm):
            return comm.isend(tensor, there) if here == 0 else comm.irecv(tensor, there)

        return start

    return [
        (True, told(comm, lambda c: c.all_reduce(x, async_op=True), lambda: x.mul_(2))),
        (True, told(comm, lambda c: c.all_gather(x, async_op=True), lambda: x.detach().zero_())),
        (True, told(comm, lambda c: c.all_to_all(x, async_op=True), lambda: x[1:2].fill_(7))),
        (True, told(comm, message(y), lambda: y.fill_(5))),
        (True, told(comm, message(whole[1]), lambda: whole.fill_(5))),
        (True, told(comm, message(grid[:, 1]), lambda: grid[2].fill_(5))),
        (False, told(comm, message(whole[1]), lambda: whole[0].fill_(6))),
        (False, told(comm, message(grid[:, 1]), lambda: grid[:, 0].fill_(6))),
        (False, told(comm, lambda c: c.all_reduce(parts[:4], async_op=True), parts[4:].zero_)),
        (False, told(comm, lambda c: c.all_gather(x, async_op=True), lambda: x + 1)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_a_write_before_wait(backend):
    for found in run(2, cases, backend=backend).results:
        for i, (is_refused, text) in enumerate(found):
            assert (text is not None) == is_refused, (i, text)
        assert "written to while an operation on it was under way" in found[0][1]
        assert "all_reduce(sum) of (4,) float32 at test_in_flight.py" in found[0][1]
        assert "c.all_reduce(x, async_op=True), lambda: x.mul_(2)" in found[0][1]


def test_results_of_parts_of_one_tensor_do_not_disturb_each_other():
    """Two slices of one bucket under way at once: each `wait` writes beside the other."""

    def program(comm):
        bucket = torch.full((6,), float(comm.rank + 1))
        handles = [comm.all_reduce(part, async_op=True) for part in bucket.chunk(3)]
        for handle in reversed(handles):
            handle.wait()
        return bucket.tolist()

    assert run(2, program).results == [[3.0] * 6] * 2


def test_rejects_two_reductions_of_one_tensor_under_way():
    def program(comm):
        x = torch.ones(2)
        for handle in [comm.all_reduce(x, async_op=True), comm.all_reduce(x, async_op=True)]:
            handle.wait()

    with pytest.raises(RuntimeError, match="written to while"):
        run(2, program)


def test_shapes_alone_are_not_compared():
    def program(comm):
        bucket = torch.ones(6)
        handle = comm.all_reduce(bucket[:3], async_op=True)
        bucket[3:].zero_()
        handle.wait()

    run_one_rank(8, program)
    run(2, program, shapes_only=True)


def test_in_inference_mode():
    """Tensors without a count of writes are compared."""

    def program(comm):
        with torch.inference_mode():
            x = torch.ones(3)
            quiet = comm.all_reduce(x, async_op=True)
            quiet.wait()
            return told(comm, lambda c: c.all_reduce(x, async_op=True), lambda: x.zero_())

    assert all("written to" in text for text in run(2, program).results)
