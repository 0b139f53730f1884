"""Oracles: bitsandbytes' tables bit for bit, the published table, exhaustive nearest search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from reference.quantization import (
    dynamic_levels,
    float4_levels,
    integer4_levels,
    nearest_level,
    normal_float_levels,
)

# QLoRA, arXiv 2305.14314, App. E, as printed there to four places.
PUBLISHED = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip


def test_normal_float_matches_bitsandbytes(bnb):
    assert torch.equal(normal_float_levels(), bnb.get_4bit_type("nf4", device="cpu"))


def test_normal_float_matches_the_paper():
    assert_close(normal_float_levels(), torch.tensor(PUBLISHED), rtol=0, atol=5e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_normal_float_invariant_ascending_with_zero_and_both_ends(bits):
    levels = normal_float_levels(bits)
    assert len(levels) == 2**bits and (levels.diff() > 0).all()
    assert levels[0] == -1 and levels[-1] == 1 and levels[2 ** (bits - 1) - 1] == 0


def test_normal_float_invariant_probabilities_between_levels():
    """Undo the scaling: the levels' probabilities are evenly spaced on either side of zero."""
    largest = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    probability = torch.special.ndtr(normal_float_levels().double() * largest)
    for side in (probability[:8], probability[7:]):
        spacing = side.diff()
        assert_close(spacing, spacing.mean().expand_as(spacing), rtol=1e-4, atol=0)


def test_float4_matches_bitsandbytes(bnb):
    assert torch.equal(float4_levels(), bnb.get_4bit_type("fp4", device="cpu"))


def test_integer4_is_even_and_wastes_a_code():
    levels = integer4_levels()
    assert torch.equal(levels, torch.tensor([*range(-7, 8), 7]) / 7)


def test_dynamic_matches_bitsandbytes(bnb):
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50))
@settings(deadline=None, max_examples=50)
def test_nearest_matches_exhaustive_search(values):
    x = torch.tensor(values)
    for levels in (normal_float_levels(), float4_levels(), dynamic_levels()):
        chosen = levels[nearest_level(x, levels).int()].double()
        distances = (x.double()[:, None] - levels.double()).abs()
        # The midpoints are float32 numbers: two levels equally near to within their rounding.
        assert_close((chosen - x.double()).abs(), distances.amin(1), rtol=0, atol=1e-7)


def test_ties_go_down():
    levels = torch.tensor([0.0, 1.0, 2.0])
    assert nearest_level(torch.tensor([0.5, 1.5]), levels).tolist() == [0, 1]


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="bits: expected 2 to 8, got 1"):
        normal_float_levels(1)
    with pytest.raises(ValueError, match="offset: expected a probability"):
        normal_float_levels(offset=1.0)
