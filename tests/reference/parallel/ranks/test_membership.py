"""Names of ranks, groups, groups of groups, meshes. Oracle: numpy's reshape of the ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.parallel.ranks import CLASSROOM, run


def test_local_rank_is_not_global_rank():
    def program(comm):
        return comm.global_rank, comm.local_rank, comm.node, comm.world_size

    results = run(17, program, hardware=CLASSROOM).results
    assert results[0] == (0, 0, 0, 17)
    assert results[7] == (7, 7, 0, 17) and results[8] == (8, 0, 1, 17)
    assert results[16] == (16, 0, 2, 17)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), world_size=st.integers(1, 9))
def test_split_matches_its_definition(data, world_size):
    """Ranks of one color, ordered by key and then by rank (MPI_Comm_split)."""
    colors = data.draw(st.lists(st.sampled_from([0, 1, 2, None]), min_size=world_size,
                                max_size=world_size))  # fmt: skip
    keys = data.draw(st.lists(st.integers(-2, 2), min_size=world_size, max_size=world_size))

    def program(comm):
        group = comm.split(colors[comm.rank], keys[comm.rank])
        if group is None:
            return None
        mine = group.all_gather(torch.tensor([comm.rank]))
        return group.rank, group.size, mine.tolist()

    for rank, result in enumerate(run(world_size, program, is_measured=False).results):
        if colors[rank] is None:
            assert result is None
            continue
        members = [r for r in range(world_size) if colors[r] == colors[rank]]
        members.sort(key=lambda r: (keys[r], r))
        assert result == (members.index(rank), len(members), members)


def test_groups_of_groups():
    def program(comm):
        half = comm.split(comm.rank // 4)
        quarter = half.split(half.rank // 2)
        pair = quarter.split(0, key=-quarter.rank)
        return pair.all_gather(torch.tensor([comm.rank])).tolist()

    results = run(8, program).results
    assert results == [[1, 0]] * 2 + [[3, 2]] * 2 + [[5, 4]] * 2 + [[7, 6]] * 2


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_mesh_matches_numpy(shape):
    names = ("dp", "pp", "tp")[: len(shape)]
    grid = np.arange(int(np.prod(shape))).reshape(shape)

    def program(comm):
        mesh = comm.mesh(**dict(zip(names, shape, strict=True)))
        found = {name: mesh[name].all_gather(torch.tensor([comm.rank])).tolist() for name in names}
        found["both"] = mesh[names].all_gather(torch.tensor([comm.rank])).tolist()
        return mesh.coordinates, found, mesh.rank_at(**dict.fromkeys(names, 0))

    for rank, (place, found, origin) in enumerate(run(grid.size, program).results):
        at = np.unravel_index(rank, shape)
        assert tuple(place.values()) == tuple(int(i) for i in at) and origin == 0
        for axis, name in enumerate(names):
            index = [*at]
            index[axis] = slice(None)
            assert found[name] == grid[tuple(index)].tolist()
        assert found["both"] == list(range(grid.size))


def test_mesh_fills_in_one_axis():
    assert run(6, lambda comm: comm.mesh(dp=-1, tp=2).shape).results[0] == {"dp": 3, "tp": 2}


def test_collectives_of_disjoint_groups_do_not_meet():
    def program(comm):
        half = comm.split(comm.rank % 2)
        tensors = [torch.tensor(float(comm.rank)) for _ in range(2 + comm.rank % 2)]
        return [half.all_reduce(x).item() for x in tensors]

    assert run(4, program).results == [[2.0] * 2, [4.0] * 3, [2.0] * 2, [4.0] * 3]


@pytest.mark.parametrize("axes", [{"dp": 3}, {"dp": 2, "tp": 4}, {"dp": 0}, {"dp": -1, "tp": 5}])
def test_rejects_axes_that_do_not_fit(axes):
    with pytest.raises(ValueError, match="axes: expected sizes with product 4"):
        run(4, lambda comm: comm.mesh(**axes))


def test_rejects_an_axis_that_is_not_there():
    with pytest.raises(AttributeError, match="pp: expected one of dp, tp"):
        run(4, lambda comm: comm.mesh(dp=2, tp=2).pp)
    with pytest.raises(KeyError, match="expected axes of the mesh"):
        run(4, lambda comm: comm.mesh(dp=2, tp=2)["pp"])
