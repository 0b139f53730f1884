"""C = A B on N ranks: in one dimension, in two, and in between two and three.

    1D      A and C in N strips of rows, B in strips too, and gathered     n^2 (N-1)/N
    2D      all in q x q blocks, N = q^2: step k broadcasts column k of    2 n^2 (q-1)/q^2
            A along rows, row k of B along columns, adds a product (SUMMA)
    2.5D    c copies of the 2D layout, N = c q^2, each doing q/c of the    2 n^2 (q-1)/(c q^2)
            steps; blocks are copied first, sums added last; c = q is 3D   + 4 n^2 (c-1)/(c q^2)

The last column is what a rank sends, on average. 1D needs room for all of B, 2.5D for c copies of
everything. Copies pay for themselves with thousands of ranks.

Forward only: no gradient comes back through the messages.

Papers: SUMMA, van de Geijn and Watts, Concurrency 9 (1997) 255-274; 2.5D, Solomonik and Demmel,
Euro-Par 2011; for transformers, 2104.05343 (2D), 2105.14500 (2.5D), 2105.14450 (3D).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reference.parallel.ranks import Comm, Mesh
from reference.parallel.tensor.operators import check_no_gradient


def matmul_1d(
    comm: Comm, a: Float[Tensor, "m k"], b: Float[Tensor, "kp n"]
) -> Float[Tensor, "m n"]:
    """This rank's rows of A B, from its rows of A and its rows of B.

    Raises: ValueError where a factor asks for a gradient, as all three products.
    """
    check_no_gradient(a=a, b=b)
    return a @ comm.all_gather(b)


def matmul_2d(mesh: Mesh, a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """This rank's block of A B, from its blocks of A and B; SUMMA on a mesh of row and column.

    Raises: ValueError for a mesh that is not square.
    """
    _check_square(mesh)
    check_no_gradient(a=a, b=b)
    return _summa_steps(mesh, a, b, range(mesh.shape["row"]))


def matmul_2_5d(
    mesh: Mesh, a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]
) -> Float[Tensor, "m n"]:
    """The same on a mesh of depth, row and column; blocks are those of depth 0, all get C's.

    Raises: ValueError for a mesh that is not square, or a depth that does not divide its side.
    """
    _check_square(mesh)
    check_no_gradient(a=a, b=b)
    depth, side = mesh.shape["depth"], mesh.shape["row"]
    if side % depth:
        raise ValueError(f"mesh: expected a depth that divides {side}, got {depth}")
    a, b = (mesh.depth.broadcast(x.clone(), src=0) for x in (a, b))
    share = side // depth
    first = mesh.coordinates["depth"] * share
    return mesh.depth.all_reduce(_summa_steps(mesh, a, b, range(first, first + share)))


def block_of(mesh: Mesh, whole: Float[Tensor, "m n"]) -> Float[Tensor, "bm bn"]:
    """This rank's block of a matrix that divides by the mesh's sides.

    Raises: ValueError for one that does not.
    """
    sides = mesh.shape["row"], mesh.shape["column"]
    if whole.shape[0] % sides[0] or whole.shape[1] % sides[1]:
        raise ValueError(
            f"whole: expected a shape of multiples of {sides}, the mesh's sides, got "
            f"{tuple(whole.shape)}; pad with zeros"
        )
    rows = whole.chunk(mesh.shape["row"])[mesh.coordinates["row"]]
    return rows.chunk(mesh.shape["column"], 1)[mesh.coordinates["column"]].contiguous()


def _summa_steps(mesh: Mesh, a: Tensor, b: Tensor, steps: range) -> Tensor:
    # The group of a row of blocks runs along the columns, and the other way round.
    row, column = mesh.column, mesh.row
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in steps:
        left = row.broadcast(a.clone() if row.rank == k else torch.empty_like(a), src=k)
        right = column.broadcast(b.clone() if column.rank == k else torch.empty_like(b), src=k)
        total += left @ right
    return total


def _check_square(mesh: Mesh) -> None:
    if mesh.shape.get("row") != mesh.shape.get("column"):
        raise ValueError(f"mesh: expected as many rows as columns, got {mesh.shape}")
