import math

import pytest
import torch

from reference.positions import LearnedPositions, sinusoidal_positions


def test_matches_the_formula_in_float64():
    table = sinusoidal_positions(torch.arange(60), 10)
    for m in (0, 1, 17, 59):
        for i in range(5):
            angle = m / 10000 ** (2 * i / 10)
            assert table[m, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[m, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_is_defined_beyond_the_width():
    far = sinusoidal_positions(torch.tensor([[100_000], [7]]), 8)
    assert far.shape == (2, 1, 8) and far.isfinite().all()


def test_invariant_a_shift_is_a_rotation():
    """PE(m + s) is PE(m) turned by an angle of s alone: why relative positions can be learned."""
    table, shift = sinusoidal_positions(torch.arange(50), 8).unflatten(-1, (-1, 2)), 7
    pairs = torch.complex(table[..., 1], table[..., 0])
    turns = pairs[shift:] / pairs[:-shift]
    torch.testing.assert_close(turns, turns[:1].expand_as(turns), rtol=1e-4, atol=1e-4)


def test_learned_positions_match_torchs_embedding():
    torch.manual_seed(0)
    positions, table = torch.tensor([[0, 3], [4, 4]]), LearnedPositions(5, 6)
    oracle = torch.nn.functional.embedding(positions, table.weight)
    assert torch.equal(table(positions), oracle)


def test_rejects_widths_and_positions():
    with pytest.raises(ValueError, match="dim: expected an even number of at least 2, got 5"):
        sinusoidal_positions(torch.arange(3), 5)
    with pytest.raises(ValueError, match="expected 0 to 4, got 0 to 5"):
        LearnedPositions(5, 6)(torch.arange(6))
