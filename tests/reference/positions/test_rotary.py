import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reference.positions import (
    apply_rope,
    apply_rope_complex,
    complex_table,
    half_to_interleaved,
    interleaved_to_half,
    rope_frequencies,
    rope_table,
)
from tests.tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table(positions, d, dtype=torch.float32):
    return rope_table(positions, rope_frequencies(d), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_matches_transformers_bit_for_bit(dtype, batched):
    x = normal(2, 3, 7, 16, dtype=dtype)
    positions = torch.arange(7) + torch.tensor([[0], [100]]) if batched else torch.arange(7)
    cos, sin = table(positions, 16, dtype)
    theirs_cos, theirs_sin = (t if batched else t[None] for t in (cos, sin))
    expected, _ = apply_rotary_pos_emb(x, x, theirs_cos, theirs_sin)
    assert torch.equal(apply_rope(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_gradients_of_transformers_bit_for_bit(dtype):
    x, grad = normal(2, 3, 7, 16, dtype=dtype), normal(2, 3, 7, 16, dtype=dtype, seed=1)
    cos, sin = table(torch.arange(7), 16, dtype)
    gradients = []
    for rotate in (
        lambda y: apply_rope(y, cos, sin),
        lambda y: apply_rotary_pos_emb(y, y, cos[None], sin[None])[0],
    ):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(rotate(leaf), leaf, grad)[0])
    assert torch.equal(*gradients)


def test_passes_gradgradcheck():
    cos, sin = table(torch.arange(3), 4, torch.float64)
    x = normal(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: apply_rope(y, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda y: apply_rope(y, cos, sin), x)


def test_gives_gradients_of_tables_where_asked():
    cos, sin = (t.requires_grad_() for t in table(torch.arange(3), 4, torch.float64))
    x = normal(1, 2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, s: apply_rope(x, c, s), (cos, sin))


def test_the_complex_form_is_the_half_form_permuted():
    x = normal(2, 3, 7, 16)
    frequencies, positions = rope_frequencies(16), torch.arange(7)
    interleaved = apply_rope_complex(x, complex_table(positions, frequencies))
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    expected = apply_rope(halves, *rope_table(positions, frequencies))
    got = interleaved.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.float32])


def test_permuted_weights_give_the_same_scores():
    torch.manual_seed(0)
    num_heads, d, positions = 3, 8, torch.arange(5)
    x, w_q, w_k = torch.randn(1, 5, 20), torch.randn(24, 20), torch.randn(24, 20)
    frequencies = rope_frequencies(d)
    q, k = ((x @ w.T).unflatten(-1, (num_heads, d)).transpose(1, 2) for w in (w_q, w_k))
    meta = [apply_rope_complex(y, complex_table(positions, frequencies)) for y in (q, k)]
    q, k = ((x @ interleaved_to_half(w, num_heads).T).unflatten(-1, (num_heads, d)).transpose(1, 2)
            for w in (w_q, w_k))  # fmt: skip
    ours = [apply_rope(y, *rope_table(positions, frequencies)) for y in (q, k)]
    torch.testing.assert_close(
        ours[0] @ ours[1].mT, meta[0] @ meta[1].mT, rtol=1e-4, atol=1e-4
    )  # sums of 8 products of size 100


def test_invariant_permutations_undo_each_other():
    weight = normal(24, 5)
    for first, second in (
        (interleaved_to_half, half_to_interleaved),
        (half_to_interleaved, interleaved_to_half),
    ):
        assert torch.equal(second(first(weight, 3), 3), weight)
        assert torch.equal(first(weight[:, 0], 3), first(weight, 3)[:, 0])


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_invariant_scores_depend_on_the_distance_alone(m, n, shift):
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

    def score(i, j):
        turned = [apply_rope(x, *table(torch.tensor([p]), 16)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    # Angles up to 6000 in float32 are off by up to 2.5e-4; 16 products of size one.
    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), rtol=1e-2, atol=1e-2)


def test_invariant_lengths_stay():
    x = normal(2, 2, 50, 32)
    turned = apply_rope(x, *table(torch.arange(50), 32))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_tables_are_computed_wide():
    positions = torch.arange(250, 260)
    cos, _ = table(positions, 8, torch.bfloat16)
    exact = (positions[:, None].double() * rope_frequencies(8).double()).cos()
    expected = exact.float().bfloat16()
    assert (cos[:, :4] != expected).float().mean() < 0.05  # ties alone may differ


def test_edges_empty_batch_one_token_strided():
    cos, sin = table(torch.arange(4), 8)
    assert apply_rope(normal(0, 2, 4, 8), cos, sin).shape == (0, 2, 4, 8)
    x = normal(1, 4, 2, 8).transpose(1, 2)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.contiguous(), cos, sin))


@pytest.mark.parametrize("has_own_positions", [False, True])
def test_invariant_heads_may_be_left_out(has_own_positions):
    positions = torch.randint(9, (2, 5)) if has_own_positions else torch.arange(5)
    cos, sin = rope_table(positions, rope_frequencies(8))
    x = normal(2, 5, 8)
    expected = apply_rope(x[:, None], cos, sin)[:, 0]
    assert torch.equal(apply_rope(x, cos, sin), expected)
    if not has_own_positions:
        assert torch.equal(apply_rope(x[1], cos, sin), expected[1])


@pytest.mark.parametrize(
    "shape, table_shape, message",
    [
        ((1, 2, 3, 5), (3, 5), "even d"),
        ((4,), (3, 4), r"x: expected \(B, H, 3, 4\)"),
        ((2, 5, 4), (3, 4), r"x: expected \(B, H, 3, 4\)"),
        ((1, 2, 3, 4), (5, 4), "with a cache, tables are for the new positions alone"),
        ((2, 2, 3, 4), (3, 3, 4), r"x: expected \(3, H, 3, 4\)"),
    ],
)
def test_rejects_shapes(shape, table_shape, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(torch.zeros(shape), torch.zeros(table_shape), torch.zeros(table_shape))


def test_rejects_a_mask_as_positions_and_odd_heads():
    with pytest.raises(TypeError, match="torch.bool"):
        rope_table(torch.ones(3, dtype=torch.bool), rope_frequencies(4))
    with pytest.raises(ValueError, match="even number of rows for each of 3 heads"):
        interleaved_to_half(torch.zeros(9, 2), 3)
