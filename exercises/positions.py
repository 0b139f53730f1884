# Exercise fd665e22c124: write your answers below, and leave this line as it is.
"""Chapter 03: positions."""

import math

import torch
import torch.nn.functional as F


def sinusoidal_encoding(num_positions, dim, base=10000.0):
    """The table of sinusoids that the first transformer added to its embeddings.

    returns (num_positions, dim) float32; row m is position m = 0, 1, ...; dim is even

        PE(m, 2i) = sin(m / base^(2i/dim))        PE(m, 2i + 1) = cos(m / base^(2i/dim))

    Any number of positions is possible, also more than dim.

    Source: arXiv 1706.03762, sec. 3.5.
    """
    raise NotImplementedError("sinusoidal_encoding: not written yet")


def rotate_pairs(x, positions, base=10000.0):
    """RoPE in the layout of Meta's code: features 2i and 2i + 1 are a pair.

    x: (B, H, T, d), d even, any floating dtype    positions: (T,) or (B, T), whole numbers
    returns the shape and dtype of x

    The pair (a, b) at position m becomes (a cos - b sin, a sin + b cos) of the angle
    m * base^(-2i/d). Angles, cosines and products in float32 (float64 for float64 x), rounded once
    at the end.

    Source: arXiv 2104.09864, eq. 34.
    """
    raise NotImplementedError("rotate_pairs: not written yet")


def rope_backward(grad, cos, sin):
    """The gradient of y = x * cos + rotate_half(x) * sin with respect to x.

    grad: (B, H, T, d), the gradient of y    cos, sin: (T, d), any numbers (YaRN scales them, and
    nothing promises that their halves are equal)    returns (B, H, T, d)

    rotate_half((first, second)) = (-second, first), the halves of the last dimension. No autograd.
    """
    raise NotImplementedError("rope_backward: not written yet")


def relative_scores(q, k, distances, base=10000.0):
    """What a query and a key score at each distance, without turning either.

    q, k: (d,), in the layout of neighbouring pairs    distances: (N,), query position minus key
    position, may be negative    returns (N,), in the dtype of q

    The result equals the product of q turned to position m with k turned to position n, for every
    m and n with m - n = distance; no division by sqrt(d).

    Source: arXiv 2104.09864, sec. 3.4.1.
    """
    raise NotImplementedError("relative_scores: not written yet")


def convert_weights(w_q, w_k, w_v, num_heads, num_kv_heads):
    """Bring a checkpoint whose RoPE pairs are neighbours to the layout of halves.

    w_q: (num_heads * d, D)    w_k, w_v: (num_kv_heads * d, D)
    returns the three matrices, in this order, for a model that pairs feature i with i + d/2

    Within each head, the rows of pair i go from 2i and 2i + 1 to i and i + d/2. The model must
    compute the same attention afterwards.

    A loader that somebody wrote is below. Its model runs, and writes nonsense. Repair it.
    """

    def halves(weight, heads):
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return halves(w_q, num_heads), halves(w_k, num_kv_heads), halves(w_v, num_kv_heads)


def rope_attention(x, w_q, w_k, w_v, num_heads, base=10000.0):
    """Causal multi-head attention whose only knowledge of order is RoPE.

    x: (B, T, D)    w_q, w_k, w_v: (num_heads * d, D)    returns (B, T, num_heads * d)

    Project, cut into heads, turn what needs turning (layout of halves: feature i with i + d/2, at
    positions 0 ... T - 1), attend with scores divided by sqrt(d), merge the heads. There is no
    output projection. F.scaled_dot_product_attention may be used.

    Source: arXiv 2104.09864, sec. 3.2.2.
    """

    raise NotImplementedError("rope_attention: not written yet")


def pairs_in_context(head_dim, base, num_tokens):
    """How many of RoPE's pairs complete at least one full turn within so many tokens?

    returns an int between 0 and head_dim / 2

    Pair i turns by base^(-2i/head_dim) radians a token. The other pairs have seen only part of the
    circle when training ends: beyond it they meet angles that are new to the model.

    Source: arXiv 2309.00071, sec. 3.2.
    """
    raise NotImplementedError("pairs_in_context: not written yet")


def stretched_frequencies(head_dim, base, factor, low, high, num_trained):
    """RoPE's frequencies as Llama 3.1 stretches them to `factor` times the context.

    returns (head_dim / 2,) float32, radians a token

    With theta_i = base^(-2i/head_dim) and r_i = num_trained * theta_i / (2 pi), the number of turns
    within the trained length:

        r_i > high          theta_i: fast pairs know the whole circle
        r_i < low           theta_i / factor: slow pairs are interpolated
        between             a blend, linear in r_i: t theta_i + (1 - t) theta_i / factor, with t
                            from 0 at r_i = low to 1 at r_i = high
    """
    raise NotImplementedError("stretched_frequencies: not written yet")
