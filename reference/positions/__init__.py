"""Positions: what tells a transformer the order of its tokens.

absolute   sinusoids and a learned table, added to the embedding
rotary     RoPE in both layouts, and the permutation between them
scaling    its frequencies, and how they are stretched to longer texts
bounds     how scores may decay with distance
"""

from reference.positions.absolute import LearnedPositions, sinusoidal_positions
from reference.positions.bounds import extrapolation_bound, interpolation_bound, mean_partial_sum
from reference.positions.rotary import (
    apply_rope,
    apply_rope_complex,
    complex_table,
    half_to_interleaved,
    interleaved_to_half,
    rope_table,
    rotation,
)
from reference.positions.scaling import (
    RopeScaling,
    attention_factor,
    ntk_base,
    rope_frequencies,
    yarn_range,
)

__all__ = [
    "LearnedPositions",
    "RopeScaling",
    "apply_rope",
    "apply_rope_complex",
    "attention_factor",
    "complex_table",
    "extrapolation_bound",
    "half_to_interleaved",
    "interleaved_to_half",
    "interpolation_bound",
    "mean_partial_sum",
    "ntk_base",
    "rope_frequencies",
    "rope_table",
    "rotation",
    "sinusoidal_positions",
    "yarn_range",
]
