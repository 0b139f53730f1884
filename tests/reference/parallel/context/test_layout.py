"""Oracle: a causal mask over all positions."""

import pytest
import torch

from reference.parallel.context import Stretch, causal_pairs, positions, stretches, tiles
from tests.reference.parallel.context.workload import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_invariant_every_position_has_one_rank(layout, num_ranks):
    held = [positions(layout, 24, rank, num_ranks) for rank in range(num_ranks)]
    assert {len(h) for h in held} == {24 // num_ranks}
    assert torch.cat(held).sort().values.tolist() == list(range(24))


def test_layouts_are_those_of_the_docstring():
    owners = {}
    for layout in LAYOUTS:
        owner = torch.empty(16, dtype=torch.long)
        for rank in range(4):
            owner[positions(layout, 16, rank, 4)] = rank
        owners[layout] = "".join(map(str, owner.tolist()))
    assert owners == {
        "contiguous": "0000111122223333",
        "zigzag": "0011223333221100",
        "striped": "0123012301230123",
    }


def paint(queries, keys, is_causal):
    """How often the tiles let each query meet each key."""
    rows, columns = (sum(s.length for s in held) for held in (queries, keys))
    met = torch.zeros(rows, columns, dtype=torch.int)
    for row, column, causal in tiles(queries, keys, is_causal=is_causal):
        part = met[row, column]
        seen = torch.ones_like(part)
        if causal:  # bottom right: the last query sees all
            seen = seen.tril(part.shape[1] - part.shape[0])
        part += seen
    return met


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks, seq_len", [(1, 8), (2, 8), (3, 12), (4, 24)])
def test_tiles_match_the_mask(layout, num_ranks, seq_len):
    """Each visible pair once, no other."""
    for rank in range(num_ranks):
        for other in range(num_ranks):
            mine, theirs = (stretches(layout, seq_len, r, num_ranks) for r in (rank, other))
            place = [positions(layout, seq_len, r, num_ranks) for r in (rank, other)]
            mask = place[0][:, None] >= place[1]
            assert torch.equal(paint(mine, theirs, True), mask.int())
            assert paint(mine, theirs, False).eq(1).all()


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("starts", [(0, 0), (0, 4), (4, 0), (2, 3), (3, 2), (40, 0), (0, 40)])
@pytest.mark.parametrize("lengths", [(4, 4), (2, 5), (5, 2), (1, 1)])
def test_tiles_of_any_stretches(step, starts, lengths):
    query, key = (Stretch(a, step, n) for a, n in zip(starts, lengths, strict=True))
    where = [torch.arange(s.length) * step + s.start for s in (query, key)]
    mask = where[0][:, None] >= where[1]
    assert torch.equal(paint([query], [key], True), mask.int())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_those_of_the_triangle(layout):
    pairs = causal_pairs(layout, 24, 4)
    assert sum(map(sum, pairs)) == 24 * 25 // 2


def test_balance():
    """Contiguous leaves ranks idle, zigzag is exact, striped off by a diagonal."""
    seq_len, n = 240, 4
    work = {layout: [sum(r) for r in causal_pairs(layout, seq_len, n)] for layout in LAYOUTS}
    mean = seq_len * (seq_len + 1) / 2 / n
    assert work["contiguous"][-1] / mean == pytest.approx((2 * n - 1) / n, rel=0.01)
    assert set(work["zigzag"]) == {mean}
    assert max(work["striped"]) - min(work["striped"]) == (seq_len // n) * (n - 1)
    # In each step too: nobody waits for the slowest.
    steps = causal_pairs("zigzag", seq_len, n)
    assert all(len(set(column)) == 1 for column in zip(*steps, strict=True))


def test_rejects():
    with pytest.raises(ValueError, match="layout: expected contiguous, zigzag or striped, got"):
        stretches("spiral", 8, 0, 2)
    with pytest.raises(ValueError, match=r"multiple of 4 for 2 ranks, zigzag; got 6; pad"):
        stretches("zigzag", 6, 0, 2)
    with pytest.raises(ValueError, match=r"multiple of 4 for 4 ranks, striped; got 6; pad"):
        stretches("striped", 6, 0, 4)
