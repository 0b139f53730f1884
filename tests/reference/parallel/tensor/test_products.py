"""Oracles: a @ b and torch.einsum on one rank; closed forms for traffic and time."""

import pytest
import torch
from torch.testing import assert_close

from reference.parallel.ranks import CLASSROOM, run
from reference.parallel.tensor import (
    Einsum,
    Move,
    block_of,
    execute,
    gathered_linear,
    matmul_1d,
    matmul_2_5d,
    matmul_2d,
    moves,
    overlapped_linear,
    part_by,
    propagate,
)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_overlapped_product_matches_the_whole(world_size):
    x, weight = draw(2, 6, 4), draw(world_size * 5, 4, seed=1)

    def program(comm):
        mine, part = x.chunk(comm.size, 1)[comm.rank], weight.chunk(comm.size)[comm.rank]
        return gathered_linear(mine, part, comm), overlapped_linear(mine, part, comm)

    for rank, both in enumerate(run(world_size, program).results):
        for y in both:
            assert_close(y, x @ weight.chunk(world_size)[rank].T)


def test_overlap_hides_the_messages():
    """Four parts, each of whose products takes longer than its message."""
    x, weight = torch.ones(1, 512, 64), torch.ones(64, 64)

    def program(comm, act):
        act(x.chunk(comm.size, 1)[comm.rank], weight, comm)

    product = 2 * 128 * 64 * 64 / CLASSROOM.flops_per_second
    message = 1e-6 + 128 * 64 * 4 / 10e9
    slow = run(4, program, gathered_linear, hardware=CLASSROOM).trace.seconds
    fast = run(4, program, overlapped_linear, hardware=CLASSROOM).trace.seconds
    assert slow == pytest.approx(4 * product + 3 * message)
    assert fast == pytest.approx(3 * max(product, message) + product)


@pytest.mark.parametrize("rows, inner, columns", [(4, 8, 4), (8, 4, 12)])
def test_products_match_the_whole(rows, inner, columns):
    a, b = draw(rows, inner), draw(inner, columns, seed=1)

    def strips(comm):
        return matmul_1d(comm, a.chunk(comm.size)[comm.rank], b.chunk(comm.size)[comm.rank])

    assert_close(torch.cat(run(4, strips).results), a @ b)

    def blocks(comm, depth):
        side = int((comm.size // depth) ** 0.5)
        if depth == 1:
            mesh = comm.mesh(row=side, column=side)
            c = matmul_2d(mesh, block_of(mesh, a), block_of(mesh, b))
        else:
            mesh = comm.mesh(depth=depth, row=side, column=side)
            is_first = mesh.coordinates["depth"] == 0
            given = [block_of(mesh, m) for m in (a, b)]
            given = given if is_first else [torch.zeros_like(m) for m in given]
            c = matmul_2_5d(mesh, *given)
        return c, block_of(mesh, a @ b)

    for world_size, depth in ((1, 1), (4, 1), (8, 2)):
        for ours, theirs in run(world_size, blocks, depth).results:
            assert_close(ours, theirs)


@pytest.mark.slow
def test_more_dimensions_send_less():
    """64 ranks, n = 64: counted bytes beside the closed forms."""
    n = 64
    whole = torch.zeros(n, n)

    def program(comm, kind):
        if kind == "1d":
            mine = whole.chunk(comm.size)[comm.rank]
            matmul_1d(comm, mine, mine)
        elif kind == "2d":
            mesh = comm.mesh(row=8, column=8)
            matmul_2d(mesh, block_of(mesh, whole), block_of(mesh, whole))
        else:
            mesh = comm.mesh(depth=4, row=4, column=4)
            matmul_2_5d(mesh, block_of(mesh, whole), block_of(mesh, whole))
        return comm.traffic.total().wire_bytes / 4

    sent = {k: sum(run(64, program, k, is_measured=False).results) / 64 for k in ("1d", "2d", "3d")}
    assert sent["1d"] == n * n * 63 / 64
    # Each of 8 steps passes two blocks along 7 of 8 ranks of a chain.
    assert sent["2d"] == 8 * 2 * (n / 8) ** 2 * 7 / 8
    # One step; two copies down 3 of 4 depths; one all-reduce of a block over 4.
    block = (n / 4) ** 2
    assert sent["3d"] == block * (2 * 3 / 4 + 2 * 3 / 4 + 2 * 3 / 4)
    assert sent["3d"] < 2 * sent["2d"] < sent["1d"]


def test_products_reject_meshes():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="mesh: expected as many rows as columns"):
        run(2, lambda comm: matmul_2d(comm.mesh(row=2, column=1), x, x))
    with pytest.raises(ValueError, match="mesh: expected a depth that divides 1, got 2"):
        run(2, lambda comm: matmul_2_5d(comm.mesh(depth=2, row=1, column=1), x, x))


def test_rejects_gradients_that_would_not_come_back():
    """all_gather and broadcast are no operations of autograd's: x.grad would be None, or a part."""
    x = torch.zeros(1, 2, 2, requires_grad=True)

    def product(comm, act):
        act(comm)

    for act in (
        lambda comm: gathered_linear(x, x[0].detach(), comm),
        lambda comm: overlapped_linear(x, x[0].detach(), comm),
        lambda comm: matmul_1d(comm, x[0].detach(), x[0]),
        lambda comm: matmul_2d(comm.mesh(row=1, column=1), x[0], x[0]),
        lambda comm: matmul_2_5d(comm.mesh(depth=1, row=1, column=1), x[0], x[0]),
    ):
        with pytest.raises(ValueError, match="expected a tensor without requires_grad"):
            run(1, product, act)
    with torch.no_grad():
        assert run(1, lambda comm: gathered_linear(x, x[0], comm).shape).results == [(1, 2, 2)]


def test_rejects_matrices_that_do_not_divide():
    with pytest.raises(ValueError, match=r"whole: expected a shape of multiples of \(2, 2\)"):
        run(4, lambda comm: block_of(comm.mesh(row=2, column=2), torch.zeros(4, 5)))


MLP = (
    Einsum("h", "btd,df->btf", ("x", "w1")),
    Einsum("y", "btf,fd->btd", ("h", "w2")),
)


@pytest.mark.parametrize(
    "annotations, expected",
    [
        ({"w1": (None, "tp")}, [Move("y", "all_reduce", "y", "tp")]),  # column, then row
        ({"x": ("dp", None, None)}, []),
        ({"x": ("dp", None, None), "w1": (None, "tp")}, [Move("y", "all_reduce", "y", "tp")]),
        # The first matrix by rows: a sum in the middle, and nothing gained.
        ({"w1": ("tp", None), "h": (None, None, None)},
         [Move("h", "all_reduce", "h", "tp")]),
        # A weight in parts along the batch's axis, as in FSDP: gathered before its use.
        ({"x": ("dp", None, None), "w1": ("dp", None), "w2": (None, None)},
         [Move("h", "all_gather", "w1", "dp")]),
    ],
)  # fmt: skip
def test_propagated_programs_match_one_rank(annotations, expected):
    whole = {"x": draw(4, 3, 4), "w1": draw(4, 6, seed=1), "w2": draw(6, 4, seed=2)}
    shardings = propagate(MLP, annotations)
    for name, given in annotations.items():
        assert shardings[name] == given
    assert moves(MLP, shardings) == expected

    def program(comm):
        mesh = comm.mesh(dp=2, tp=2)
        parts = {name: part_by(value, shardings[name], mesh) for name, value in whole.items()}
        found = execute(MLP, shardings, parts, mesh)
        h = whole["x"] @ whole["w1"]
        return [
            (found[name], part_by(value, shardings[name], mesh))
            for name, value in (("h", h), ("y", h @ whole["w2"]))
        ]

    for rank in run(4, program).results:
        for ours, theirs in rank:
            assert_close(ours, theirs)


def test_propagation_finds_megatrons_layout():
    """One annotation on the first matrix is enough; the batch's axis does not disturb it."""
    shardings = propagate(MLP, {"w1": (None, "tp"), "x": ("dp", None, None)})
    assert shardings["w2"] == ("tp", None)
    assert shardings["h"] == ("dp", None, "tp") and shardings["y"] == ("dp", None, None)


def test_propagation_rejects():
    with pytest.raises(ValueError, match="w1: expected 2 axes or None, got"):
        propagate(MLP, {"w1": ("tp",)})
    with pytest.raises(ValueError, match="x: expected among w1, w2"):
        run(1, lambda c: execute(MLP, propagate(MLP, {}), {"w1": draw(1, 1), "w2": draw(1, 1)},
                                 c.mesh(tp=1)))  # fmt: skip
