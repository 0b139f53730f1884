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
    # BEGIN SOLUTION
    even = torch.arange(0, dim, 2, dtype=torch.float64)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * base ** (-even / dim)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).float()
    # END SOLUTION


def rotate_pairs(x, positions, base=10000.0):
    """RoPE in the layout of Meta's code: features 2i and 2i + 1 are a pair.

    x: (B, H, T, d), d even, any floating dtype    positions: (T,) or (B, T), whole numbers
    returns the shape and dtype of x

    The pair (a, b) at position m becomes (a cos - b sin, a sin + b cos) of the angle
    m * base^(-2i/d). Angles, cosines and products in float32 (float64 for float64 x), rounded once
    at the end.

    Source: arXiv 2104.09864, eq. 34.
    """
    # BEGIN SOLUTION
    wide = torch.promote_types(x.dtype, torch.float32)
    theta = base ** (-torch.arange(0, x.shape[-1], 2, dtype=wide) / x.shape[-1])
    angles = positions.to(wide)[..., None] * theta
    if positions.ndim == 2:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    # END SOLUTION


def rope_backward(grad, cos, sin):
    """The gradient of y = x * cos + rotate_half(x) * sin with respect to x.

    grad: (B, H, T, d), the gradient of y    cos, sin: (T, d), any numbers (YaRN scales them, and
    nothing promises that their halves are equal)    returns (B, H, T, d)

    rotate_half((first, second)) = (-second, first), the halves of the last dimension. No autograd.
    """
    # BEGIN SOLUTION
    first, second = (grad * sin).chunk(2, -1)
    return grad * cos + torch.cat((second, -first), -1)
    # END SOLUTION


def relative_scores(q, k, distances, base=10000.0):
    """What a query and a key score at each distance, without turning either.

    q, k: (d,), in the layout of neighbouring pairs    distances: (N,), query position minus key
    position, may be negative    returns (N,), in the dtype of q

    The result equals the product of q turned to position m with k turned to position n, for every
    m and n with m - n = distance; no division by sqrt(d).

    Source: arXiv 2104.09864, sec. 3.4.1.
    """
    # BEGIN SOLUTION
    theta = base ** (-torch.arange(0, len(q), 2, dtype=q.dtype) / len(q))
    angles = distances.to(q.dtype)[:, None] * theta
    (a, b), (c, e) = q.view(-1, 2).T, k.view(-1, 2).T
    same, crossed = a * c + b * e, a * e - b * c
    return angles.cos() @ same + angles.sin() @ crossed
    # END SOLUTION


def convert_weights(w_q, w_k, w_v, num_heads, num_kv_heads):
    """Bring a checkpoint whose RoPE pairs are neighbours to the layout of halves.

    w_q: (num_heads * d, D)    w_k, w_v: (num_kv_heads * d, D)
    returns the three matrices, in this order, for a model that pairs feature i with i + d/2

    Within each head, the rows of pair i go from 2i and 2i + 1 to i and i + d/2. The model must
    compute the same attention afterwards.

    A loader that somebody wrote is below. Its model runs, and writes nonsense. Repair it.
    """

    # BEGIN SOLUTION
    def halves(weight, heads):
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return halves(w_q, num_heads), halves(w_k, num_kv_heads), w_v
    # STARTER
    # | def halves(weight, heads):
    # |     return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    # |
    # | return halves(w_q, num_heads), halves(w_k, num_kv_heads), halves(w_v, num_kv_heads)
    # END SOLUTION


def rope_attention(x, w_q, w_k, w_v, num_heads, base=10000.0):
    """Causal multi-head attention whose only knowledge of order is RoPE.

    x: (B, T, D)    w_q, w_k, w_v: (num_heads * d, D)    returns (B, T, num_heads * d)

    Project, cut into heads, turn what needs turning (layout of halves: feature i with i + d/2, at
    positions 0 ... T - 1), attend with scores divided by sqrt(d), merge the heads. There is no
    output projection. F.scaled_dot_product_attention may be used.

    Source: arXiv 2104.09864, sec. 3.2.2.
    """

    # BEGIN SOLUTION
    def heads(weight):
        return (x @ weight.T).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k, v = heads(w_q), heads(w_k), heads(w_v)
    d = q.shape[-1]
    theta = base ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * theta
    cos, sin = angles.cos(), angles.sin()

    def turn(y):
        a, b = y.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
    return out.transpose(1, 2).flatten(2)
    # END SOLUTION


def pairs_in_context(head_dim, base, num_tokens):
    """How many of RoPE's pairs complete at least one full turn within so many tokens?

    returns an int between 0 and head_dim / 2

    Pair i turns by base^(-2i/head_dim) radians a token. The other pairs have seen only part of the
    circle when training ends: beyond it they meet angles that are new to the model.

    Source: arXiv 2309.00071, sec. 3.2.
    """
    # BEGIN SOLUTION
    turns = [num_tokens * base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    return sum(turn >= 2 * math.pi for turn in turns)
    # END SOLUTION


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
    # BEGIN SOLUTION
    theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = num_trained * theta / (2 * math.pi)
    t = ((turns - low) / (high - low)).clamp(0, 1)
    return (t * theta + (1 - t) * theta / factor).float()
    # END SOLUTION
