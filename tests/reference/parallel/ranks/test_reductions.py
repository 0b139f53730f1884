"""Each reduction in each dtype, on both backends. Oracle: torch's operations on two tensors.

Where gloo, left to itself, answers otherwise (a NaN in max, a sum of booleans), a test shows that.
"""

import itertools

import pytest
import torch
import torch.distributed as dist

from reference.parallel.ranks import REDUCTIONS, run

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex128, torch.complex64]
INTEGERS = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
OTHERS = [torch.int16, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
NAN, INF = float("nan"), float("inf")
LENGTH = 12


def draw(rank, dtype):
    """Random numbers; for floats, a NaN on one rank each, infinities and zeros of both signs."""
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_complex:
        return torch.randn(LENGTH, generator=generator, dtype=torch.complex64).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 120, (LENGTH,), generator=generator).to(dtype)
    x = 3 * torch.randn(LENGTH, generator=generator)
    x[rank] = NAN
    x[3], x[4], x[5] = (INF, 0.0, -1.0) if rank == 0 else (-INF, -0.0, INF)
    return x.to(dtype)


def all_reductions(comm):
    """For each operation, dtype and reduction: the result, or the error's type and words."""
    found = {}
    for dtype, op in itertools.product([*FLOATS, *COMPLEX, *INTEGERS, *OTHERS], REDUCTIONS):
        x = draw(comm.rank, dtype)
        calls = {
            "all_reduce": lambda x=x, op=op: comm.all_reduce(x.clone(), op),
            "reduce": lambda x=x, op=op: comm.reduce(x.clone(), 0, op),
            "reduce_scatter": lambda x=x, op=op: comm.reduce_scatter(x, op),
        }
        for name, call in calls.items():
            try:
                found[name, dtype, op] = call()
            except Exception as error:
                found[name, dtype, op] = (type(error), str(error))
    return found


def in_every_order(tensors, op):
    """The reduction by torch's own operation, for each order in which ranks can be taken."""
    results = []
    for first, *rest in itertools.permutations(tensors):
        total = first
        for tensor in rest:
            total = REDUCTIONS[op](total, tensor)
        if op == "mean":
            total = total / len(tensors)
        results.append(total)
    return results


def is_same(one, other):
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    return (one == other) | (one.isnan() & other.isnan())


@pytest.mark.parametrize("world_size", [2, 3])
def test_matches_torch_in_each_dtype_on_both_backends(world_size):
    simulated = run(world_size, all_reductions).results
    processes = run(world_size, all_reductions, backend="processes").results
    num_values = 0
    for rank, found in enumerate(processes):
        for key, result in found.items():
            name, dtype, op = key
            ours = simulated[rank][key]
            if isinstance(result, tuple):
                assert ours == result and result[0] is TypeError, key
                continue
            assert ours.dtype == result.dtype == dtype
            if name == "reduce" and rank:
                continue
            part = LENGTH // world_size
            mine = (
                slice(rank * part, (rank + 1) * part) if name == "reduce_scatter" else slice(None)
            )
            orders = in_every_order([draw(r, dtype)[mine] for r in range(world_size)], op)
            possible = torch.stack([is_same(result, order) for order in orders])
            assert possible.any(0).all(), key
            assert is_same(ours, orders[0]).all(), key
            num_values += 1
    assert num_values > 100


@pytest.mark.parametrize("backend", ["simulated", "processes"])
def test_rejects_what_gloo_cannot_reduce(backend):
    found = run(1, all_reductions, backend=backend).results[0]
    for dtype, op in itertools.product(OTHERS, REDUCTIONS):
        assert "convert to" in found["all_reduce", dtype, op][1]
    for dtype, op in itertools.product(COMPLEX, ("min", "max", "product")):
        assert "expected real numbers" in found["reduce_scatter", dtype, op][1]
    for dtype in INTEGERS:
        assert "expected a floating dtype for a mean" in found["reduce", dtype, "mean"][1]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_rejects_complex32():
    with pytest.raises(TypeError, match="convert to complex64"):
        run(1, lambda comm: comm.all_reduce(torch.ones(2, dtype=torch.complex32)))


def test_invariant_max_and_min_keep_a_nan_of_any_rank():
    """gloo keeps or loses it by the rank that has it: here beside ours, for both ranks."""

    def program(comm):
        mine = torch.tensor([NAN, 2.0]) if comm.rank == 0 else torch.tensor([1.0, NAN])
        plain, ours = mine.clone(), {op: comm.all_reduce(mine.clone(), op) for op in ("max", "min")}
        if dist.is_initialized():
            dist.all_reduce(plain, dist.ReduceOp.MAX)
        return plain, ours

    for backend in ("simulated", "processes"):
        for plain, ours in run(2, program, backend=backend).results:
            assert ours["max"].isnan().all() and ours["min"].isnan().all()
            if backend == "processes":
                assert plain.isnan().tolist() == [True, False]


def test_matches_torch_on_special_floats():
    """The integers in which max and min travel order all floats as floats do."""

    def program(comm, dtype):
        info = torch.finfo(dtype)
        values = [0.0, -0.0, info.tiny, -info.tiny, info.max, info.min, INF, -INF, 1.0, -1.0]
        mine = torch.tensor(values[:: 1 - 2 * comm.rank], dtype=dtype)
        other = torch.tensor(values[:: 2 * comm.rank - 1], dtype=dtype)
        biggest, smallest = (comm.all_reduce(mine.clone(), op) for op in ("max", "min"))
        return (
            torch.equal(biggest, torch.maximum(mine, other)),
            torch.equal(smallest, torch.minimum(mine, other)),
        )

    def programs(comm):
        return [program(comm, dtype) for dtype in FLOATS]

    assert run(2, programs, backend="processes").results == [[(True, True)] * 4] * 2


def test_any_dtype_can_be_moved():
    """gloo moves few dtypes; they travel as bytes, and so do their results."""

    def program(comm):
        found = []
        for dtype in [*FLOATS, *COMPLEX, *INTEGERS, *OTHERS]:
            x = draw(comm.rank, dtype)[:2]
            got = [
                comm.all_gather(x),
                comm.broadcast(x.clone(), 0),
                comm.gather(x, 0),
                comm.scatter(torch.empty(1).to(dtype), x, src=0),
                comm.all_to_all(x),
            ]
            if comm.rank:
                got.append(comm.recv(x.clone(), 0))
            else:
                comm.send(x, 1)
            found += [None if t is None else t.view(torch.uint8).tolist() for t in got]
        return found

    assert run(2, program, backend="processes").results == run(2, program).results
