"""Oracles: Megatron-LM's documented example; torch's DeviceMesh rule; the simulated mesh."""

import math

import pytest
import torch

from reference.parallel.pipeline import (
    LlamaStage,
    groups_along,
    layers_of_stages,
    megatron_groups,
    split_llama,
)
from reference.parallel.ranks import run
from tests.reference.parallel.pipeline.workload import batch, fresh


def test_matches_megatrons_documented_sixteen_ranks():
    """The docstring of initialize_model_parallel: tensor 2, pipeline 4."""
    groups = megatron_groups(16, tp=2, pp=4)
    assert groups["tp"] == [[i, i + 1] for i in range(0, 16, 2)]
    assert groups["dp"] == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert groups["pp"] == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


GRIDS = [
    {"pp": 4, "dp": 2, "tp": 2},
    {"pp": 2, "dp": 2, "cp": 2, "tp": 2},
    {"pp": 2, "replicate": 2, "shard": 2, "cp": 2, "tp": 2},
]


@pytest.mark.parametrize("sizes", GRIDS)
def test_matches_strides_of_a_grid_and_the_simulated_mesh(sizes):
    world_size = math.prod(sizes.values())
    grid = torch.arange(world_size).view(*sizes.values())
    pairs = [(axis,) for axis in sizes] + [tuple(sizes)[1:3]]

    def program(comm):
        mesh = comm.mesh(**sizes)
        return [list(mesh[axes].group.ranks) for axes in pairs]

    done = run(world_size, program, is_measured=False)
    for i, axes in enumerate(pairs):
        places = [list(sizes).index(axis) for axis in axes]
        others = [j for j in range(len(sizes)) if j not in places]
        size = math.prod(sizes[axis] for axis in axes)
        expected = grid.permute(*others, *places).reshape(-1, size).tolist()
        assert groups_along(sizes, *axes) == expected
        for rank, found in enumerate(done.results):
            assert rank in found[i] and found[i] in expected


def test_invariant_groups_part_the_world():
    for groups in megatron_groups(64, tp=4, pp=2, cp=2).values():
        assert sorted(rank for group in groups for rank in group) == list(range(64))


def test_layers_divide_as_evenly_as_they_can():
    assert layers_of_stages(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    for num_stages in range(1, 12):
        parts = layers_of_stages(11, num_stages)
        assert [i for part in parts for i in part] == list(range(11))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_stages_in_a_row_are_the_model():
    tokens, _ = batch()
    expected = fresh()(tokens)
    model = fresh()
    x = tokens
    for rank in range(4):
        (stage,) = split_llama(model, rank, 4)
        x = stage(x)
    assert torch.equal(x, expected)


def test_rejects_impossible_partitions():
    with pytest.raises(ValueError, match="num_stages: expected 1 to 4"):
        layers_of_stages(4, 5)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        split_llama(fresh(), 2, 2)
    with pytest.raises(ValueError, match="recompute: expected none, selective or full"):
        LlamaStage(fresh(), range(0, 2), recompute="some")
    with pytest.raises(ValueError, match="world_size: expected a multiple of"):
        megatron_groups(12, tp=8)
    with pytest.raises(ValueError, match="tp: expected at least 1"):
        groups_along({"tp": 0}, "tp")
    with pytest.raises(KeyError, match="expected axes of the grid"):
        groups_along({"tp": 2}, "pp")
