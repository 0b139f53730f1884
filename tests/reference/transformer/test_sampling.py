import pytest
import torch
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reference.transformer.sampling import filter_logits, generate, greedy, sample


def logits(rows=6, vocabulary=50, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=["temperature", "top_k", "top_p", "all three"],
)
def test_matches_transformers(ours, theirs):
    for seed in range(20):
        x = expected = logits(seed=seed)
        for warper in theirs:
            expected = warper(None, expected)
        assert torch.equal(filter_logits(x, **ours), expected)


def test_invariant_something_is_always_kept():
    for options in ({"top_p": 1e-9}, {"top_k": 1}, {"top_k": 10_000}, {"top_p": 1.0}):
        kept = filter_logits(logits(), **options).isfinite().sum(-1)
        assert (kept >= 1).all()
    assert (filter_logits(logits(), top_p=1e-9).isfinite().sum(-1) == 1).all()


def test_invariant_what_means_off_cuts_nothing():
    """A vocabulary of 128,256: a cumulative sum in float32 passes 1 long before its end."""
    for seed in range(3):
        x = 2 * torch.randn(1, 128_256, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(filter_logits(x, top_p=1.0), x)
    assert torch.equal(filter_logits(x, top_k=0), x)


def test_matches_a_sum_in_float64_on_a_flat_vocabulary():
    """100,000 equal tokens: the smallest set that reaches p has p of them, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        for p, expected in ((0.9, 90_000), (0.99999, 99_999)):
            kept = filter_logits(torch.zeros(100_000, dtype=dtype), top_p=p).isfinite().sum()
            assert abs(int(kept) - expected) <= 1


def test_matches_greedy_at_temperatures_near_zero():
    """vllm#1623, vllm#3063: a small temperature overflowed, and all probabilities were NaN."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = logits().to(dtype)
        x[:, 0] = -torch.inf  # vllm#22180: a token that is not allowed
        expected = greedy(x)
        for temperature in (0.0, 1e-60, 1e-39, 1e-38, 1e-20, 1e-6, 1e-4):
            assert torch.equal(sample(x, temperature=temperature, top_p=0.9), expected)
            kept = filter_logits(x, temperature=temperature).softmax(-1)
            assert kept.isfinite().all() and torch.equal(greedy(kept), expected)


def test_invariant_a_warm_temperature_shifts_nothing():
    x = torch.tensor([[1e38, 2e38, -3e38]])
    assert torch.equal(filter_logits(x, temperature=0.7), (x / 0.7))
    assert filter_logits(x, temperature=0.01).tolist() == [[-torch.inf, 0.0, -torch.inf]]


def test_rejects_rows_without_a_distribution():
    """vllm#641: "probability tensor contains either `inf`, `nan`" says nothing of the row."""
    for bad in (-torch.inf, torch.nan, torch.inf):
        x = logits(4)
        x[2] = bad
        with pytest.raises(ValueError, match=r"finite largest one.* in rows \[2\]"):
            sample(x, top_p=0.9)
    assert filter_logits(torch.zeros(2, 3, device="meta"), top_k=2).shape == (2, 3)


def test_samples_follow_the_distribution():
    x = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    counts = sample(x, generator=torch.Generator().manual_seed(0)).bincount(minlength=3)
    # five standard errors of a share of 0.7 among 20,000
    assert torch.allclose(counts / 20_000, torch.tensor([0.1, 0.2, 0.7]), atol=0.016)


def test_seeds_repeat():
    draws = [sample(logits(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def successor(tokens):
    """A model that is certain of token + 1, of 10."""
    return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 50


def test_generates_one_token_at_a_time():
    out = generate(successor, torch.tensor([[3, 4], [8, 9]]), 3)
    assert out.tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 1, 2]]


def test_stops_where_all_have_stopped():
    out = generate(successor, torch.tensor([[5], [3]]), 10, stop=6)
    assert out.tolist() == [[5, 6, 6, 6], [3, 4, 5, 6]]


def test_shows_the_model_its_context():
    lengths = []

    def model(tokens):
        lengths.append(tokens.shape[1])
        return successor(tokens)

    generate(model, torch.tensor([[1, 2]]), 4, context=3)
    assert lengths == [2, 3, 3, 3]
    assert greedy(torch.tensor([[0.0, 2.0]])).tolist() == [1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature: expected at least 0 and finite, got -1.0; 0 is"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": float("inf")}, "got inf"),
        ({"top_k": -1}, "top_k: expected at least 1, or 0 to cut nothing, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a value in \(0, 1\]"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(logits(), **options)


def test_rejects_an_empty_prompt():
    with pytest.raises(ValueError, match="at least one token"):
        generate(successor, torch.zeros(1, 0, dtype=torch.long), 3)
