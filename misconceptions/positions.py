"""Chapter 03: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

SINUSOIDS = "2. Sinusoids"
ROPE = "4. RoPE: turn, do not add"
LAYOUTS = "5. Two layouts"
DISTANCE = "6. Only the distance matters"
BACKWARD = "7. The backward pass"
BEYOND = "9. Beyond the training length"
STRETCH = "10. Stretching the context"


def _theta(d, base, dtype=torch.float64, *, first=0, step=2):
    """base^(-step (i + first) / d) for d/2 pairs."""
    i = torch.arange(d // 2, dtype=dtype) + first
    return base ** (-step * i / d)


# sinusoidal_encoding


def _table(num_positions, dim, theta, *, layout="pairs", positions=None):
    m = torch.arange(num_positions, dtype=torch.float64) if positions is None else positions
    angles = m[:, None] * theta
    if layout == "halves":
        return torch.cat((angles.sin(), angles.cos()), -1).float()
    if layout == "cosine first":
        return torch.stack((angles.cos(), angles.sin()), -1).flatten(1).float()
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).float()


@misconception(
    "sinusoidal_encoding",
    "All sines stand first in your table, then all cosines. In the paper sine and cosine of one "
    "frequency are neighbours. A model could live with either, a checkpoint cannot.",
    see=SINUSOIDS,
)
def puts_sines_first(num_positions, dim, base=10000.0):
    return _table(num_positions, dim, _theta(dim, base), layout="halves")


@misconception(
    "sinusoidal_encoding",
    "Your frequency index is off by one: the first pair has i = 0 and turns one radian a token.",
    see=SINUSOIDS,
)
def starts_the_frequencies_at_one(num_positions, dim, base=10000.0):
    return _table(num_positions, dim, _theta(dim, base, first=1))


@misconception(
    "sinusoidal_encoding",
    "Your exponent is i/dim. It is 2i/dim, where i counts pairs: the slowest pair should come near "
    "1/base, yours stops at its root.",
    see=SINUSOIDS,
)
def halves_the_exponent(num_positions, dim, base=10000.0):
    return _table(num_positions, dim, _theta(dim, base, step=1))


@misconception(
    "sinusoidal_encoding",
    "Your positions wrap around at dim, as if the table could only be that long. A sinusoid is "
    "defined for every position; dim limits the number of frequencies.",
    see=SINUSOIDS,
)
def limits_the_length_to_the_width(num_positions, dim, base=10000.0):
    positions = torch.arange(num_positions, dtype=torch.float64) % dim
    return _table(num_positions, dim, _theta(dim, base), positions=positions)


@misconception(
    "sinusoidal_encoding",
    "Your first position is 1. It is 0: its row is 0, 1, 0, 1, ...",
    see=SINUSOIDS,
)
def counts_positions_from_one(num_positions, dim, base=10000.0):
    positions = torch.arange(1, num_positions + 1, dtype=torch.float64)
    return _table(num_positions, dim, _theta(dim, base), positions=positions)


@misconception(
    "sinusoidal_encoding",
    "Cosine and sine have changed places: even features are sines.",
    see=SINUSOIDS,
)
def puts_the_cosine_first(num_positions, dim, base=10000.0):
    return _table(num_positions, dim, _theta(dim, base), layout="cosine first")


@alternative("sinusoidal_encoding")
def entry_by_entry(num_positions, dim, base=10000.0):
    table = torch.empty(num_positions, dim)
    for m in range(num_positions):
        for i in range(dim // 2):
            angle = m / base ** (2 * i / dim)
            table[m, 2 * i], table[m, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


@alternative("sinusoidal_encoding")
def with_slices_and_exp(num_positions, dim, base=10000.0):
    table = torch.zeros(num_positions, dim)
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(base) / dim))
    table[:, 0::2] = torch.sin(torch.arange(num_positions).unsqueeze(1) * rate)
    table[:, 1::2] = torch.cos(torch.arange(num_positions).unsqueeze(1) * rate)
    return table


# rotate_pairs


def _angles(positions, theta):
    angles = positions.to(theta.dtype)[..., None] * theta
    return angles[:, None] if positions.ndim == 2 else angles


def _turn_pairs(x, angles):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def _turn_halves(x, angles):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, -1)
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@misconception(
    "rotate_pairs",
    "You pair feature i with i + d/2, the layout of transformers. This exercise, like Meta's code, "
    "pairs neighbours. On the same weights the two are different models.",
    see=LAYOUTS,
)
def pairs_the_halves(x, positions, base=10000.0):
    return _turn_halves(x, _angles(positions, _theta(x.shape[-1], base)))


@misconception(
    "rotate_pairs",
    "You turn backwards. Scores would still depend on the distance alone, but not as those of the "
    "checkpoint: (a cos - b sin, a sin + b cos).",
    see=ROPE,
)
def turns_backwards(x, positions, base=10000.0):
    return _turn_pairs(x, -_angles(positions, _theta(x.shape[-1], base)))


@misconception(
    "rotate_pairs",
    "Your frequency index is off by one: pair 0 turns one radian a token.",
    see=ROPE,
)
def starts_the_pairs_at_one(x, positions, base=10000.0):
    return _turn_pairs(x, _angles(positions, _theta(x.shape[-1], base, first=1)))


@misconception(
    "rotate_pairs",
    "Your exponent is i/d instead of 2i/d: the slowest pair turns as the root of what it should.",
    see=ROPE,
)
def takes_half_the_exponent(x, positions, base=10000.0):
    return _turn_pairs(x, _angles(positions, _theta(x.shape[-1], base, step=1)))


@misconception(
    "rotate_pairs",
    "You add sine and cosine to x. That is the sinusoidal encoding: RoPE multiplies, it turns each "
    "pair and keeps its length.",
    see=ROPE,
)
def adds_instead_of_turning(x, positions, base=10000.0):
    angles = _angles(positions, _theta(x.shape[-1], base))
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
    return (x.double() + table).to(x.dtype)


@misconception(
    "rotate_pairs",
    "You count positions from 0 yourself and ignore those you are given. With a cache, or padding "
    "at the left, the first token that you see is not at position 0.",
    see=ROPE,
)
def ignores_the_positions(x, positions, base=10000.0):
    return _turn_pairs(x, _angles(torch.arange(x.shape[2]), _theta(x.shape[-1], base)))


@misconception(
    "rotate_pairs",
    "Your angles are computed in the dtype of x. bfloat16 cannot tell position 257 from 256, and "
    "the rounding grows with the position: angles belong in float32.",
    see=ROPE,
)
def computes_angles_in_half_precision(x, positions, base=10000.0):
    theta = _theta(x.shape[-1], base).to(x.dtype)
    return _turn_pairs(x, _angles(positions.to(x.dtype), theta))


@alternative("rotate_pairs")
def as_complex_numbers(x, positions, base=10000.0):
    angles = _angles(positions, _theta(x.shape[-1], base, torch.float32))
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return (
        torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        .flatten(-2)
        .to(x.dtype)
    )


@alternative("rotate_pairs")
def with_rotation_matrices(x, positions, base=10000.0):
    angles = _angles(positions, _theta(x.shape[-1], base))
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = x.double().unflatten(-1, (-1, 2)).unsqueeze(-1)
    return (matrices @ pairs).squeeze(-1).flatten(-2).to(x.dtype)


# rope_backward


def _rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


@misconception(
    "rope_backward",
    "You apply the forward pass to the gradient. The gradient of a turn is the turn back: the sign "
    "of the sine changes.",
    see=BACKWARD,
)
def turns_the_gradient_forwards(grad, cos, sin):
    return grad * cos + _rotate_half(grad) * sin


@misconception(
    "rope_backward",
    "You multiply by the sine after the halves have changed places. The sine stood with y's "
    "half: multiply first. (Equal only where both halves of sin are.)",
    see=BACKWARD,
)
def swaps_before_it_multiplies(grad, cos, sin):
    return grad * cos - _rotate_half(grad) * sin


@misconception(
    "rope_backward",
    "Your gradient has the cosine part alone. x appears in rotate_half(x) as well.",
    see=BACKWARD,
)
def forgets_the_sine(grad, cos, sin):
    return grad * cos


@misconception(
    "rope_backward",
    "You divide by the cosine part, as if y = x * cos alone had to be undone. A gradient is the "
    "transpose of the map, not its inverse.",
    see=BACKWARD,
)
def inverts_instead_of_transposing(grad, cos, sin):
    a, b = grad.chunk(2, -1)
    (c1, c2), (s1, s2) = cos.chunk(2, -1), sin.chunk(2, -1)
    determinant = c1 * c2 + s1 * s2 + 1e-3
    return torch.cat(((a * c2 + b * s1) / determinant, (b * c1 - a * s2) / determinant), -1)


@alternative("rope_backward")
def half_by_half(grad, cos, sin):
    h = grad.shape[-1] // 2
    out = torch.empty_like(grad)
    out[..., :h] = grad[..., :h] * cos[..., :h] + grad[..., h:] * sin[..., h:]
    out[..., h:] = grad[..., h:] * cos[..., h:] - grad[..., :h] * sin[..., :h]
    return out


@alternative("rope_backward")
def with_swapped_tables(grad, cos, sin):
    swapped = torch.roll(sin, sin.shape[-1] // 2, -1)
    return grad * cos - _rotate_half(grad) * swapped


# relative_scores


def _h(q, k):
    return torch.view_as_complex(q.view(-1, 2)) * torch.view_as_complex(k.view(-1, 2)).conj()


def _scores(h, distances, theta):
    turns = torch.polar(torch.ones_like(theta), distances.double()[:, None] * theta)
    return (turns * h).sum(-1).real


@misconception(
    "relative_scores",
    "Your distance has the wrong sign: the query stands at m, the key at n, and the angle is that "
    "of m - n. Your scores are those of a key that comes later.",
    see=DISTANCE,
)
def measures_the_distance_from_the_key(q, k, distances, base=10000.0):
    return _scores(_h(q, k), -distances, _theta(len(q), base))


@misconception(
    "relative_scores",
    "You multiply the complex numbers without a conjugate. Then the angles of q and k add up, and "
    "the result depends on where the pair stands.",
    see=DISTANCE,
)
def forgets_the_conjugate(q, k, distances, base=10000.0):
    h = torch.view_as_complex(q.view(-1, 2)) * torch.view_as_complex(k.view(-1, 2))
    return _scores(h, distances, _theta(len(q), base))


@misconception(
    "relative_scores",
    "You keep the cosine alone. The part with the sine makes the score tell before from after.",
    see=DISTANCE,
)
def forgets_the_crossed_part(q, k, distances, base=10000.0):
    return _scores(_h(q, k).real.to(torch.complex128), distances, _theta(len(q), base))


@misconception(
    "relative_scores",
    "You take the size of the distance. A key before the query and one as far after it do not "
    "score alike: the sign is part of the distance.",
    see=DISTANCE,
)
def drops_the_sign_of_the_distance(q, k, distances, base=10000.0):
    return _scores(_h(q, k), distances.abs(), _theta(len(q), base))


@misconception(
    "relative_scores",
    "You divide by sqrt(d). The exercise asks for the bare product.",
    see=DISTANCE,
)
def divides_by_the_root_of_the_width(q, k, distances, base=10000.0):
    return _scores(_h(q, k), distances, _theta(len(q), base)) / math.sqrt(len(q))


@misconception(
    "relative_scores",
    "You pair feature i with i + d/2. Here neighbours are a pair.",
    see=LAYOUTS,
)
def pairs_features_half_a_head_apart(q, k, distances, base=10000.0):
    q, k = (x.view(2, -1).T.contiguous().flatten() for x in (q, k))
    return _scores(_h(q, k), distances, _theta(len(q), base))


@misconception(
    "relative_scores",
    "Your base is 10000 whatever is passed. Llama 3 uses 500000, SmolLM2 100000: the base decides "
    "how long a context the slow pairs can tell apart.",
    see=BEYOND,
)
def takes_the_base_for_a_constant(q, k, distances, base=10000.0):
    return _scores(_h(q, k), distances, _theta(len(q), 10000.0))


@alternative("relative_scores")
def by_turning_the_query_alone(q, k, distances, base=10000.0):
    angles = distances.to(q.dtype)[:, None] * _theta(len(q), base, q.dtype)
    a, b = q[0::2], q[1::2]
    turned = torch.stack(
        (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1
    )
    return turned.flatten(1) @ k


@alternative("relative_scores")
def as_the_real_part(q, k, distances, base=10000.0):
    return _scores(_h(q, k), distances, _theta(len(q), base)).to(q.dtype)


# convert_weights


def _halves(weight, heads):
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@misconception(
    "convert_weights",
    "Your result is the program's as it came. What does RoPE do to each of the three matrices' "
    "results, and which of them does the new layout concern?",
    see=LAYOUTS,
    is_starter=True,
)
def the_converter_is_not_repaired_yet(w_q, w_k, w_v, num_heads, num_kv_heads):
    return _halves(w_q, num_heads), _halves(w_k, num_kv_heads), _halves(w_v, num_kv_heads)


@misconception(
    "convert_weights",
    "You use the weights as they are. The two layouts pair different features: the same weights "
    "under the other one are another model.",
    see=LAYOUTS,
)
def takes_the_layouts_for_interchangeable(w_q, w_k, w_v, num_heads, num_kv_heads):
    return w_q, w_k, w_v


@misconception(
    "convert_weights",
    "You reorder the queries alone. Query and key must agree on the order of features, or their "
    "products mix different ones.",
    see=LAYOUTS,
)
def forgets_the_keys(w_q, w_k, w_v, num_heads, num_kv_heads):
    return _halves(w_q, num_heads), w_k, w_v


@misconception(
    "convert_weights",
    "You reorder the matrix as if it were one head. Pairs stay within their head: cut the rows "
    "into heads first.",
    see=LAYOUTS,
)
def reorders_across_heads(w_q, w_k, w_v, num_heads, num_kv_heads):
    return _halves(w_q, 1), _halves(w_k, 1), w_v


@misconception(
    "convert_weights",
    "Your permutation is the inverse: it brings halves to neighbours.",
    see=LAYOUTS,
)
def converts_the_other_way(w_q, w_k, w_v, num_heads, num_kv_heads):
    def pairs(weight, heads):
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return pairs(w_q, num_heads), pairs(w_k, num_kv_heads), w_v


@misconception(
    "convert_weights",
    "You cut W_K into as many heads as W_Q has. With grouped queries it has fewer.",
    see=LAYOUTS,
)
def gives_keys_as_many_heads_as_queries(w_q, w_k, w_v, num_heads, num_kv_heads):
    heads = num_heads if w_k.shape[0] % (2 * num_heads) == 0 else 1
    return _halves(w_q, num_heads), _halves(w_k, heads), w_v


@alternative("convert_weights")
def with_an_index(w_q, w_k, w_v, num_heads, num_kv_heads):
    def order(weight, heads):
        d = weight.shape[0] // heads
        within = torch.cat((torch.arange(0, d, 2), torch.arange(1, d, 2)))
        return weight[(torch.arange(heads)[:, None] * d + within).flatten()]

    return order(w_q, num_heads), order(w_k, num_kv_heads), w_v


@alternative("convert_weights")
def head_by_head(w_q, w_k, w_v, num_heads, num_kv_heads):
    def halves(weight, heads):
        return torch.cat([part for head in weight.chunk(heads) for part in (head[::2], head[1::2])])

    return [halves(w_q, num_heads), halves(w_k, num_kv_heads), w_v.clone()]


# rope_attention


def _heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _turn(y, base):
    return _turn_halves(y, _angles(torch.arange(y.shape[2]), _theta(y.shape[-1], base)))


def _project(x, num_heads, *weights):
    return [_heads(x @ w.T, num_heads) for w in weights]


@misconception(
    "rope_attention",
    "You turn the values too. The output would then carry the position of each key, turned, and "
    "the distance would no longer be all that counts: only queries and keys are turned.",
    see=ROPE,
)
def turns_the_values_too(x, w_q, w_k, w_v, num_heads, base=10000.0):
    return _attend(*(_turn(y, base) for y in _project(x, num_heads, w_q, w_k, w_v)))


@misconception(
    "rope_attention",
    "You add sinusoids to the input instead of turning queries and keys. RoPE touches neither the "
    "embedding nor the values.",
    see=ROPE,
)
def adds_positions_to_the_embedding(x, w_q, w_k, w_v, num_heads, base=10000.0):
    table = _table(x.shape[1], x.shape[2], _theta(x.shape[2], base)).to(x.dtype)
    return _attend(*_project(x + table, num_heads, w_q, w_k, w_v))


@misconception(
    "rope_attention",
    "You turn x before the projection. A projection mixes the pairs again, and the distance is "
    "lost: turn queries and keys, head by head.",
    see=ROPE,
)
def turns_before_the_projection(x, w_q, w_k, w_v, num_heads, base=10000.0):
    turned = _turn(x[:, None], base)[:, 0]
    q, k = _project(turned, num_heads, w_q, w_k)
    return _attend(q, k, *_project(x, num_heads, w_v))


@misconception(
    "rope_attention",
    "You turn queries and keys before they are cut into heads. The frequencies then run over all "
    "heads, and each head gets a few neighbouring ones instead of the whole range.",
    see=ROPE,
)
def turns_all_heads_as_one(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k = (_turn((x @ w.T)[:, None], base)[:, 0] for w in (w_q, w_k))
    return _attend(_heads(q, num_heads), _heads(k, num_heads), _heads(x @ w_v.T, num_heads))


@misconception(
    "rope_attention",
    "You turn the queries alone. Then the score depends on the query's absolute position.",
    see=DISTANCE,
)
def turns_the_queries_alone(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k, v = _project(x, num_heads, w_q, w_k, w_v)
    return _attend(_turn(q, base), k, v)


@misconception(
    "rope_attention",
    "You turn the keys the other way. Query and key are turned alike, each to its own position; "
    "the product then takes the difference by itself. Yours depends on m + n.",
    see=DISTANCE,
)
def turns_the_keys_backwards(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k, v = _project(x, num_heads, w_q, w_k, w_v)
    back = -_angles(torch.arange(x.shape[1]), _theta(q.shape[-1], base))
    return _attend(_turn(q, base), _turn_halves(k, back), v)


@misconception(
    "rope_attention",
    "Nothing in your attention depends on positions, apart from the mask.",
    see="1. What attention does not see",
)
def leaves_positions_out(x, w_q, w_k, w_v, num_heads, base=10000.0):
    return _attend(*_project(x, num_heads, w_q, w_k, w_v))


@misconception(
    "rope_attention",
    "You turn x itself and leave W_Q and W_K out, 'since position needs none'. Without them every "
    "token asks for what it is, and its score with itself is the largest: RoPE turns what the "
    "projections make, and makes it relative with or without them.",
    see=DISTANCE,
)
def leaves_out_the_projections(x, w_q, w_k, w_v, num_heads, base=10000.0):
    same = x[..., : w_q.shape[0]]
    if same.shape[-1] < w_q.shape[0]:
        same = F.pad(same, (0, w_q.shape[0] - same.shape[-1]))
    turned = _turn(_heads(same, num_heads), base)
    return _attend(turned, turned, *_project(x, num_heads, w_v))


@misconception(
    "rope_attention",
    "You turn neighbouring pairs; this exercise has the layout of halves.",
    see=LAYOUTS,
)
def turns_neighbours(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k, v = _project(x, num_heads, w_q, w_k, w_v)
    angles = _angles(torch.arange(x.shape[1]), _theta(q.shape[-1], base))
    return _attend(_turn_pairs(q, angles), _turn_pairs(k, angles), v)


@alternative("rope_attention")
def with_tables_and_rotate_half(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k, v = _project(x, num_heads, w_q, w_k, w_v)
    angles = _angles(torch.arange(x.shape[1]), _theta(q.shape[-1], base))
    angles = torch.cat((angles, angles), -1).to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    return _attend(q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin, v)


@alternative("rope_attention")
def with_scores_by_hand(x, w_q, w_k, w_v, num_heads, base=10000.0):
    q, k, v = _project(x, num_heads, w_q, w_k, w_v)
    scores = torch.einsum("bhtd,bhsd->bhts", _turn(q, base), _turn(k, base)) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bhsd->bthd", weights, v).flatten(2)


# pairs_in_context


def _pairs(head_dim, base, num_tokens, *, turn=2 * math.pi, first=0, step=2):
    periods = [turn * base ** (step * (i + first) / head_dim) for i in range(head_dim // 2)]
    return sum(period <= num_tokens for period in periods)


@misconception(
    "pairs_in_context",
    "You ask for one radian. A full turn is 2 pi of them.",
    see=BEYOND,
)
def takes_a_radian_for_a_turn(head_dim, base, num_tokens):
    return _pairs(head_dim, base, num_tokens, turn=1.0)


@misconception(
    "pairs_in_context",
    "Your base is 10000 for every model, as if it fitted every context. Longer contexts are "
    "trained with larger bases: Llama 3 has 500000.",
    see=BEYOND,
)
def thinks_that_base_10000_fits_every_context(head_dim, base, num_tokens):
    return _pairs(head_dim, 10000.0, num_tokens)


@misconception(
    "pairs_in_context",
    "You ask for half a turn: pi radians. A full circle is 2 pi.",
    see=BEYOND,
)
def takes_half_a_turn_for_one(head_dim, base, num_tokens):
    return _pairs(head_dim, base, num_tokens, turn=math.pi)


@misconception(
    "pairs_in_context",
    "You count features. Each pair has two of them and one frequency.",
    see=BEYOND,
)
def counts_features(head_dim, base, num_tokens):
    return 2 * _pairs(head_dim, base, num_tokens)


@misconception(
    "pairs_in_context",
    "Your frequency index is off by one: the fastest pair has i = 0 and needs 2 pi tokens.",
    see=BEYOND,
)
def counts_pairs_from_one(head_dim, base, num_tokens):
    return _pairs(head_dim, base, num_tokens, first=1)


@misconception(
    "pairs_in_context",
    "You count the pairs that do not complete a turn.",
    see=BEYOND,
)
def counts_the_slow_pairs(head_dim, base, num_tokens):
    return head_dim // 2 - _pairs(head_dim, base, num_tokens)


@alternative("pairs_in_context")
def with_tensors(head_dim, base, num_tokens):
    turns = num_tokens * _theta(head_dim, base) / (2 * math.pi)
    return int((turns >= 1).sum())


@alternative("pairs_in_context")
def by_walking_up(head_dim, base, num_tokens):
    count = 0
    while count < head_dim // 2 and 2 * math.pi * base ** (2 * count / head_dim) <= num_tokens:
        count += 1
    return count


# stretched_frequencies


def _stretch(head_dim, base, factor, blend, *, slow=None):
    theta = _theta(head_dim, base)
    slow = theta / factor if slow is None else slow
    return (blend * theta + (1 - blend) * slow).float()


def _turns(head_dim, base, num_trained):
    return num_trained * _theta(head_dim, base) / (2 * math.pi)


@misconception(
    "stretched_frequencies",
    "You divide every frequency: position interpolation. Fast pairs, which tell neighbours apart, "
    "are then squeezed for nothing.",
    see=STRETCH,
)
def interpolates_everything(head_dim, base, factor, low, high, num_trained):
    return _stretch(head_dim, base, factor, torch.zeros(head_dim // 2))


@misconception(
    "stretched_frequencies",
    "You leave all frequencies as they are: beyond the trained length the slow pairs meet angles "
    "that the model has never seen.",
    see=BEYOND,
)
def extrapolates(head_dim, base, factor, low, high, num_trained):
    return _stretch(head_dim, base, factor, torch.ones(head_dim // 2))


@misconception(
    "stretched_frequencies",
    "Your blend is upside down: slow pairs are kept and fast ones divided.",
    see=STRETCH,
)
def stretches_the_fast_pairs(head_dim, base, factor, low, high, num_trained):
    t = ((_turns(head_dim, base, num_trained) - low) / (high - low)).clamp(0, 1)
    return _stretch(head_dim, base, factor, 1 - t)


@misconception(
    "stretched_frequencies",
    "Your frequencies jump: between low and high there should be a linear blend.",
    see=STRETCH,
)
def leaves_out_the_blend(head_dim, base, factor, low, high, num_trained):
    t = (_turns(head_dim, base, num_trained) >= low).double()
    return _stretch(head_dim, base, factor, t)


@misconception(
    "stretched_frequencies",
    "You blend wavelengths. The rule blends frequencies: the mean of two wavelengths is not the "
    "wavelength of the mean frequency.",
    see=STRETCH,
)
def blends_wavelengths(head_dim, base, factor, low, high, num_trained):
    theta = _theta(head_dim, base)
    t = ((_turns(head_dim, base, num_trained) - low) / (high - low)).clamp(0, 1)
    return (1 / (t / theta + (1 - t) * factor / theta)).float()


@misconception(
    "stretched_frequencies",
    "You multiply the slow pairs by the factor. A longer context needs slower pairs: divide.",
    see=STRETCH,
)
def makes_slow_pairs_faster(head_dim, base, factor, low, high, num_trained):
    t = ((_turns(head_dim, base, num_trained) - low) / (high - low)).clamp(0, 1)
    return _stretch(head_dim, base, factor, t, slow=_theta(head_dim, base) * factor)


@misconception(
    "stretched_frequencies",
    "You measure turns in radians: a factor of 2 pi is missing in r, and pairs count as fast that "
    "are not.",
    see=STRETCH,
)
def counts_radians_as_turns(head_dim, base, factor, low, high, num_trained):
    turns = 2 * math.pi * _turns(head_dim, base, num_trained)
    t = ((turns - low) / (high - low)).clamp(0, 1)
    return _stretch(head_dim, base, factor, t)


@misconception(
    "stretched_frequencies",
    "You raise the base by factor^(d/(d-2)), the NTK-aware rule. It is another way to the same "
    "end; Llama 3.1 keeps fast pairs exactly.",
    see=STRETCH,
)
def raises_the_base(head_dim, base, factor, low, high, num_trained):
    return _theta(head_dim, base * factor ** (head_dim / (head_dim - 2))).float()


@alternative("stretched_frequencies")
def case_by_case(head_dim, base, factor, low, high, num_trained):
    out = torch.empty(head_dim // 2)
    for i in range(head_dim // 2):
        theta = base ** (-2 * i / head_dim)
        turns = num_trained * theta / (2 * math.pi)
        if turns > high:
            out[i] = theta
        elif turns < low:
            out[i] = theta / factor
        else:
            t = (turns - low) / (high - low)
            out[i] = t * theta + (1 - t) * theta / factor
    return out


@alternative("stretched_frequencies")
def by_wavelengths(head_dim, base, factor, low, high, num_trained):
    theta = _theta(head_dim, base, torch.float32)
    wavelengths = 2 * math.pi / theta
    t = (num_trained / wavelengths - low) / (high - low)
    blended = torch.lerp(theta / factor, theta, t)
    slow = torch.where(wavelengths > num_trained / low, theta / factor, blended)
    return torch.where(wavelengths < num_trained / high, theta, slow)
