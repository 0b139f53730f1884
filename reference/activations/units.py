"""Which units work: a ReLU unit learns from the inputs that reach it, and from no others.

Where the pre-activation is positive, the slope is 1 and the input teaches the unit's weights; where
it is not, the slope is 0 and this input teaches nothing. A unit that no input reaches is dead: its
gradient is exactly zero. One that only some inputs reach is selective, which is its work.

Shapes: F hidden width; everything before it is the inputs.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from reference.activations.pointwise import check_floating


def active_share(preactivation: Float[Tensor, "... F"]) -> Float[Tensor, " F"]:
    """For each unit, the share of inputs on which it is positive; float32.

    Raises: ValueError without inputs, TypeError for whole numbers.
    """
    check_floating(preactivation)
    if not preactivation.ndim or not preactivation.numel():
        raise ValueError(
            "preactivation: expected (..., F) with at least one input, "
            f"got {tuple(preactivation.shape)}; nothing can be said of units that saw nothing"
        )
    return (preactivation > 0).reshape(-1, preactivation.shape[-1]).float().mean(0)


def dead_units(preactivation: Float[Tensor, "... F"]) -> Bool[Tensor, " F"]:
    """The units that are positive on none of the inputs; under ReLU they get no gradient at all.

    Only as good as the inputs: a unit may wake up on one that is not among them.
    """
    return ~(active_share(preactivation) > 0)
