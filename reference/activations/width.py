"""How wide a feed-forward layer is, and what it costs.

A layer with a gate has 3 D F parameters, one without has 2 D F. From F = 4D to F = 8D/3 both have
8 D^2: the 2/3 rule. Llama rounds the result up to a multiple that suits the hardware.

Shapes: D model width, F hidden width.
Papers: the 2/3 rule, 2002.05202, sec. 2; rounding, Meta's llama3/model.py, class FeedForward.
"""

from reference.activations.gated import check_widths


def swiglu_hidden_dim(model_dim: int, *, multiplier: float = 1.0, multiple_of: int = 256) -> int:
    """2/3 of 4 D, times `multiplier`, each cut to a whole number; up to the next `multiple_of`.

    Gives the width of every Llama with its params.json: `multiplier` is their ffn_dim_multiplier.

    Raises: ValueError for a width, a multiple or a multiplier that is not positive.
    Source: meta-llama/llama-models, models/llama3/model.py, class FeedForward.
    """
    check_widths(model_dim=model_dim, multiple_of=multiple_of)
    if multiplier <= 0:
        raise ValueError(f"multiplier: expected more than 0, got {multiplier}")
    hidden_dim = int(multiplier * int(2 * 4 * model_dim / 3))
    return multiple_of * -(-hidden_dim // multiple_of)


def feed_forward_parameters(model_dim: int, hidden_dim: int, *, is_gated: bool) -> int:
    """Weights of one layer without biases: 3 D F with a gate, 2 D F without."""
    check_widths(model_dim=model_dim, hidden_dim=hidden_dim)
    return (3 if is_gated else 2) * model_dim * hidden_dim


def feed_forward_flops(
    model_dim: int, hidden_dim: int, *, is_gated: bool, num_tokens: int = 1
) -> int:
    """FLOPs of the matrix products of one forward pass: 2 a weight and token."""
    return 2 * num_tokens * feed_forward_parameters(model_dim, hidden_dim, is_gated=is_gated)
