import math

import pytest
import torch

from reference.positions import interpolation_bound, mean_partial_sum, rope_frequencies


def test_matches_a_sum_over_python_numbers():
    frequencies = rope_frequencies(8)
    for distance in (0.0, 3.0, 250.0):
        partial, sizes = 0j, []
        for theta in frequencies.double().tolist():
            partial += complex(math.cos(distance * theta), math.sin(distance * theta))
            sizes.append(abs(partial))
        got = mean_partial_sum(torch.tensor([distance]), frequencies)
        assert got.item() == pytest.approx(sum(sizes) / 4)


def test_matches_roformers_trend():
    """Figure 2 of RoFormer, d = 128: a fall that is not monotone."""
    distances = torch.tensor([1.0, 10, 50, 100, 500, 1000, 4000])
    bound = mean_partial_sum(distances, rope_frequencies(128))
    expected = torch.tensor([31.5, 18.0, 12.6, 10.2, 6.2, 4.5, 5.0]).double()
    torch.testing.assert_close(bound, expected, rtol=0, atol=0.06)


def test_matches_position_interpolations_constant():
    """2306.15595, theorem 2.1: d max|h| / 294.73, at least 2 * 294.73 below extrapolation's."""
    assert 128 / interpolation_bound(128) == pytest.approx(294.73, abs=0.005)
    extrapolation = mean_partial_sum(torch.arange(1.0, 4096), rope_frequencies(128))
    assert extrapolation.min() / 128 * 2 >= 0.03
