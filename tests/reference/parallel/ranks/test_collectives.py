"""Oracles: torch.distributed on gloo, called directly, and the definitions on stacked tensors."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from reference.parallel.ranks import CollectiveMismatch, run
from tests.tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.AVG,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
ROOTED = ("broadcast", "reduce", "gather", "scatter")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
OPERATIONS = (*ROOTED, "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send")


def draw(shape, dtype, *key):
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


@st.composite
def steps(draw_from, world_size):
    """One operation of a script: what, on which groups, with which shapes."""
    operation = draw_from(st.sampled_from(OPERATIONS))
    dtype = draw_from(st.sampled_from(DTYPES))
    reductions = [r for r in REDUCE_OPS if dtype.is_floating_point or r != "mean"]
    colors = draw_from(st.lists(st.integers(0, 1), min_size=world_size, max_size=world_size))
    return {
        "operation": operation,
        "dtype": dtype,
        "reduction": draw_from(st.sampled_from(reductions)),
        "shape": tuple(draw_from(st.lists(st.integers(0, 4), min_size=1, max_size=3))),
        "root": draw_from(st.integers(0, world_size - 1)),
        "colors": colors if draw_from(st.booleans()) else [0] * world_size,
        "rows": draw_from(
            st.lists(
                st.lists(st.integers(0, 3), min_size=world_size, max_size=world_size),
                min_size=world_size,
                max_size=world_size,
            )
        ),
        "is_async": draw_from(st.booleans()),
    }


def scripts(world_size):
    return st.lists(steps(world_size), min_size=4, max_size=8)


def parts(step, i, members, me):
    """This rank's tensor, and the rows it sends to and receives from each member."""
    n, here = len(members), members.index(me)
    sends = [step["rows"][me][member] for member in members]
    receives = [step["rows"][member][me] for member in members]
    rows = step["shape"][0]
    if step["operation"] in ("reduce_scatter", "scatter"):
        rows *= n
    if step["operation"] == "all_to_all":
        rows = sum(sends)
    tensor = draw((rows, *step["shape"][1:]), step["dtype"], i, me)
    return tensor, sends, receives, here, step["root"] % n


def members_of(step, me):
    return [r for r, color in enumerate(step["colors"]) if color == step["colors"][me]]


def ours(comm, script):
    """The script on a Comm: the program under test."""
    results = []
    for i, step in enumerate(script):
        members = members_of(step, comm.rank)
        tensor, sends, receives, here, root = parts(step, i, members, comm.rank)
        group = comm.split(step["colors"][comm.rank])
        operation, is_async = step["operation"], {"async_op": step["is_async"]}
        call = getattr(group, operation)
        if operation == "send":
            if group.size > 1 and here == 0:
                group.send(tensor, group.size - 1)
            if group.size > 1 and here == group.size - 1:
                tensor = group.recv(torch.empty_like(tensor), 0)
            results.append(tensor)
            continue
        if operation == "all_to_all":
            out = call(tensor, input_splits=sends, output_splits=receives, **is_async)
        elif operation == "scatter":
            whole = tensor if here == root else None
            out = call(torch.empty_like(tensor[: step["shape"][0]]), whole, src=root, **is_async)
        elif operation in ("broadcast", "gather"):
            out = call(tensor, root, **is_async)
        elif operation == "reduce":
            out = call(tensor, root, step["reduction"], **is_async)
        elif operation == "all_gather":
            out = call(tensor, **is_async)
        else:
            out = call(tensor, step["reduction"], **is_async)
        results.append(out.wait() if step["is_async"] else out)
    return results


def torchs(comm, script):
    """The script by torch.distributed alone; of `comm` only the rank is used."""
    results, me = [], comm.rank
    for i, step in enumerate(script):
        groups = {c: dist.new_group([r for r, d in enumerate(step["colors"]) if d == c])
                  for c in sorted(set(step["colors"]))}  # fmt: skip
        group, members = groups[step["colors"][me]], members_of(step, me)
        tensor, sends, receives, here, root = parts(step, i, members, me)
        n, op, rest = len(members), REDUCE_OPS[step["reduction"]], tensor.shape[1:]
        out = tensor
        match step["operation"]:
            case "all_reduce":
                dist.all_reduce(tensor, op, group)
            case "reduce":
                before = tensor.clone()
                dist.reduce(tensor, op=op, group=group, group_dst=root)
                out = tensor if here == root else before
            case "broadcast":
                dist.broadcast(tensor, group=group, group_src=root)
            case "all_gather":
                out = torch.empty(n * len(tensor), *rest, dtype=tensor.dtype)
                dist.all_gather_single(out, tensor, group)
            case "gather":
                pieces = [torch.empty_like(tensor) for _ in members] if here == root else None
                dist.gather(tensor, pieces, group=group, group_dst=root)
                out = torch.cat(pieces) if here == root else None
            case "reduce_scatter":
                out = torch.empty(len(tensor) // n, *rest, dtype=tensor.dtype)
                dist.reduce_scatter_single(out, tensor, op, group)
            case "scatter":
                out = torch.empty(len(tensor) // n, *rest, dtype=tensor.dtype)
                pieces = list(tensor.tensor_split(n)) if here == root else None
                dist.scatter(out, pieces, group=group, group_src=root)
            case "all_to_all":
                out = torch.empty(sum(receives), *rest, dtype=tensor.dtype)
                dist.all_to_all_single(out, tensor, receives, sends, group)
            case "send" if n > 1 and here == 0:
                dist.send(tensor, group=group, group_dst=n - 1)
            case "send" if n > 1 and here == n - 1:
                dist.recv(out, group=group, group_src=0)
        results.append(out)
    return results


def assert_same(actual, expected, *, is_bitwise):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            bitwise = is_bitwise or not one.dtype.is_floating_point
            tolerance = {"rtol": 0, "atol": 0} if bitwise else TOLERANCE[one.dtype]
            assert_close(one, other, **tolerance, equal_nan=True)


class TestAgainstTorchDistributed:
    @settings(max_examples=12, deadline=None)
    @given(script=scripts(2))
    def test_matches_gloo_bit_for_bit_on_two_ranks(self, script):
        simulated = run(2, ours, script).results
        direct = run(2, torchs, script, backend="processes").results
        for rank in range(2):
            assert_same(simulated[rank], direct[rank], is_bitwise=True)

    @settings(max_examples=8, deadline=None)
    @given(script=scripts(4))
    def test_matches_gloo_on_four_ranks(self, script):
        simulated = run(4, ours, script).results
        direct = run(4, torchs, script, backend="processes").results
        for rank in range(4):
            assert_same(simulated[rank], direct[rank], is_bitwise=False)

    @settings(max_examples=6, deadline=None)
    @given(script=scripts(3))
    def test_matches_the_same_program_on_processes(self, script):
        simulated = run(3, ours, script).results
        processes = run(3, ours, script, backend="processes").results
        for rank in range(3):
            assert_same(simulated[rank], processes[rank], is_bitwise=False)


class TestDefinitions:
    """Each operation on 1 to 64 ranks, from the stack of all ranks' tensors."""

    @pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
    def test_matches_definition(self, n):
        everyone = torch.stack([draw((2 * n, 3), torch.float64, "x", r) for r in range(n)])

        def program(comm):
            x = everyone[comm.rank].clone()
            return {
                "all_reduce": comm.all_reduce(x.clone()),
                "max": comm.all_reduce(x.clone(), "max"),
                "all_gather": comm.all_gather(x),
                "reduce_scatter": comm.reduce_scatter(x, "mean"),
                "all_to_all": comm.all_to_all(x),
                "broadcast": comm.broadcast(x.clone(), n - 1),
                "scatter": comm.scatter(torch.empty(2, 3, dtype=x.dtype), x, src=n // 2),
                "gather": comm.gather(x, 0),
            }

        for r, result in enumerate(run(n, program).results):
            mine = slice(2 * r, 2 * r + 2)
            assert_close(result["all_reduce"], everyone.sum(0))
            assert_close(result["max"], everyone.amax(0))
            assert torch.equal(result["all_gather"], everyone.flatten(0, 1))
            assert_close(result["reduce_scatter"], everyone.mean(0)[mine])
            assert torch.equal(result["all_to_all"], everyone[:, mine].flatten(0, 1))
            assert torch.equal(result["broadcast"], everyone[-1])
            assert torch.equal(result["scatter"], everyone[n // 2, mine])
            assert (result["gather"] is None) == (r != 0)
        assert torch.equal(run(n, program).results[0]["gather"], everyone.flatten(0, 1))

    def test_sums_in_rank_order(self):
        """(1e8 + 1) - 1e8 is 0 in float32; any other order gives 1."""
        values = [1e8, 1.0, -1e8]
        results = run(3, lambda comm: comm.all_reduce(torch.tensor(values[comm.rank]))).results
        assert [r.item() for r in results] == [0.0] * 3

    def test_scalars_gather_to_a_vector(self):
        results = run(3, lambda comm: comm.all_gather(torch.tensor(float(comm.rank)))).results
        assert all(torch.equal(r, torch.arange(3.0)) for r in results)

    def test_works_in_place_on_views_and_leaves(self):
        def program(comm):
            base = torch.arange(12.0).view(3, 4).requires_grad_()
            comm.all_reduce(base)
            transposed = torch.ones(2, 3).t()
            return base, comm.all_reduce(transposed), transposed

        base, returned, transposed = run(2, program).results[1]
        assert torch.equal(base.detach(), 2 * torch.arange(12.0).view(3, 4))
        assert returned is transposed and torch.equal(transposed, torch.full((3, 2), 2.0))

    def test_fills_out(self):
        def program(comm):
            out = torch.empty(4)
            returned = comm.all_gather(torch.ones(2) * comm.rank, out=out)
            return returned is out, out

        is_same, out = run(2, program).results[0]
        assert is_same and out.tolist() == [0, 0, 1, 1]

    def test_autograd_sees_a_change_in_place(self):
        def program(comm):
            x = torch.ones(2, requires_grad=True)
            y = x.exp()
            comm.all_reduce(y)
            y.sum().backward()

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(2, program)


class TestHandles:
    def test_result_comes_with_wait_and_not_before(self):
        def program(comm):
            x = torch.ones(2)
            handle = comm.all_reduce(x, async_op=True)
            before = x.clone()
            return before, handle.wait(), x

        for before, returned, x in run(3, program).results:
            assert before.tolist() == [1, 1] and returned is x and x.tolist() == [3, 3]

    def test_messages_overtake_nothing(self):
        def program(comm):
            if comm.rank == 0:
                handles = [comm.isend(torch.tensor([i]), 1, tag=i % 2) for i in range(6)]
            else:
                handles = [comm.irecv(torch.empty(1).long(), 0, tag=t) for t in (1, 1, 1, 0, 0, 0)]
            return [handle.wait() for handle in handles]

        assert [t.item() for t in run(2, program).results[1]] == [1, 3, 5, 0, 2, 4]

    def test_ring_of_isend_and_irecv(self):
        def program(comm):
            out = torch.empty(1)
            sending = comm.isend(torch.tensor([float(comm.rank)]), (comm.rank + 1) % comm.size)
            comm.recv(out, (comm.rank - 1) % comm.size)
            sending.wait()
            return out.item()

        assert run(5, program).results == [4, 0, 1, 2, 3]

    def test_asking_lets_others_run(self):
        def program(comm):
            handle = comm.barrier(async_op=True)
            while not handle.is_completed():
                pass
            handle.wait()
            return handle.is_completed()

        assert run(3, program).results == [True] * 3

    def test_rejects_a_handle_nobody_waited_for(self):
        def program(comm):
            comm.all_reduce(torch.ones(2), async_op=True)

        with pytest.raises(RuntimeError, match=r"without wait\(\).*\n.*all_reduce\(sum\)"):
            run(2, program)


class TestRejections:
    def test_rejects_another_shape(self):
        def program(comm):
            comm.all_reduce(torch.ones(2 + comm.rank // 2))

        with pytest.raises(CollectiveMismatch) as caught:
            run(3, program)
        text = str(caught.value)
        assert "collective 0 of group 'world': the ranks disagree about the shape" in text
        assert "rank 1: all_reduce(sum) of (2,) float32 at test_collectives.py" in text
        assert "rank 2: all_reduce(sum) of (3,) float32 at" in text
        assert "in program: comm.all_reduce(torch.ones(2 + comm.rank // 2))" in text

    @pytest.mark.parametrize(
        ("what", "call"),
        [
            ("operation", lambda c, x: c.all_reduce(x) if c.rank else c.reduce_scatter(x)),
            ("operation", lambda c, x: c.barrier() if c.rank else c.all_gather(x)),
            ("reduction", lambda c, x: c.all_reduce(x, "max" if c.rank else "min")),
            ("root", lambda c, x: c.broadcast(x, c.rank)),
            ("dtype", lambda c, x: c.all_gather(x.double() if c.rank else x)),
            ("shape", lambda c, x: c.broadcast(x[c.rank :], 0)),
            (
                "rows that rank 1 sends to rank 0",
                lambda c, x: c.all_to_all(x, input_splits=[2, 2], output_splits=[2 - c.rank, 2]),
            ),
        ],
    )
    def test_rejects_calls_that_disagree(self, what, call):
        expected = what if what != "rows that rank 1 sends to rank 0" else "rows that rank"
        with pytest.raises(CollectiveMismatch, match=f"disagree about the {expected}"):
            run(2, lambda comm: call(comm, torch.ones(4)))

    def test_rejects_a_message_of_another_shape(self):
        def program(comm):
            if comm.rank == 0:
                comm.send(torch.ones(3), 1)
            else:
                comm.recv(torch.empty(4), 0)

        with pytest.raises(CollectiveMismatch, match="a message in group 'world'.*shape"):
            run(2, program)

    @pytest.mark.parametrize(
        ("message", "call"),
        [
            ("op: expected one of sum, mean", lambda c, x: c.all_reduce(x, "avg")),
            ("expected a floating dtype for a mean", lambda c, x: c.all_reduce(x.int(), "mean")),
            ("multiple of 2, the size of group 'world'", lambda c, x: c.reduce_scatter(x[:3])),
            ("src: expected a rank of group 'world', 0 to 1", lambda c, x: c.broadcast(x, 2)),
            ("dst: expected another rank", lambda c, x: c.send(x, c.rank)),
            (r"out: expected shape \(8,\)", lambda c, x: c.all_gather(x, out=torch.empty(4))),
            (
                "input_splits: expected the sum 4, got 3",
                lambda c, x: c.all_to_all(x, input_splits=[1, 2], output_splits=[2, 2]),
            ),
            ("expected both or neither", lambda c, x: c.all_to_all(x, input_splits=[1, 3])),
            (
                "expected 2 sizes from 0 on",
                lambda c, x: c.all_to_all(x, input_splits=[4], output_splits=[4]),
            ),
            ("expected the whole on rank 0", lambda c, x: c.scatter(x, src=0)),
            (r"expected shape \(8,\)", lambda c, x: c.scatter(x, x, src=0)),
        ],
    )
    def test_rejects_wrong_arguments(self, message, call):
        with pytest.raises((ValueError, TypeError), match=message):
            run(2, lambda comm: call(comm, torch.ones(4)))
