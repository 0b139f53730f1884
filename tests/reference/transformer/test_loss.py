import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from reference.transformer import IGNORED, cross_entropy, next_token_loss
from tests.tolerances import TOLERANCE

VOCAB = 13


def make_batch(batch=3, seq_len=8, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, seq_len, VOCAB, generator=rng)).to(dtype)
    labels = torch.randint(VOCAB, (batch, seq_len), generator=rng)
    is_padding = torch.arange(seq_len) >= torch.randint(1, seq_len + 1, (batch, 1), generator=rng)
    return logits, labels.masked_fill(is_padding, IGNORED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_transformers(dtype):
    logits, labels = make_batch(dtype=dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    actual = next_token_loss(ours, labels)
    expected = ForCausalLMLoss(theirs, labels, VOCAB)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])
    actual.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_matches_the_definition(batch, seq_len, seed):
    logits, labels = make_batch(batch, seq_len, torch.float64, seed)
    logs = logits.log_softmax(-1)
    losses = [
        -logs[b, t, labels[b, t + 1]]
        for b in range(batch)
        for t in range(seq_len - 1)
        if labels[b, t + 1] != IGNORED
    ]
    total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
    close = TOLERANCE[torch.float64]
    torch.testing.assert_close(next_token_loss(logits, labels, reduction="sum"), total, **close)
    mean = total / max(1, len(losses))
    torch.testing.assert_close(next_token_loss(logits, labels), mean, **close)
    each = next_token_loss(logits, labels, reduction="none")
    assert each.shape == (batch, seq_len - 1)
    torch.testing.assert_close(each.sum(), total, **close)


def test_uniform_logits_cost_ln_vocabulary():
    labels = torch.arange(6)[None]
    assert next_token_loss(torch.zeros(1, 6, VOCAB), labels).item() == pytest.approx(
        math.log(VOCAB)
    )


def test_copying_the_input_is_no_prediction():
    labels = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(0))
    copied, foretold = (20 * F.one_hot(x, VOCAB).float() for x in (labels, labels.roll(-1, 1)))
    assert next_token_loss(copied, labels) > 10
    assert next_token_loss(foretold, labels) < 1e-6


def test_invariant_padding_and_the_last_position_get_no_gradient():
    logits, labels = make_batch()
    logits.requires_grad_()
    next_token_loss(logits, labels).backward()
    has_label = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    assert torch.equal(logits.grad.abs().sum(-1) > 0, has_label)


def test_nothing_to_predict_costs_nothing():
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 5), IGNORED))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    assert next_token_loss(torch.randn(2, 1, VOCAB), torch.zeros(2, 1, dtype=torch.long)) == 0


def test_half_precision_is_summed_in_float32():
    logits = torch.full((1, 4096, 8), 2.0, dtype=torch.float16)
    loss = next_token_loss(logits, torch.zeros(1, 4096, dtype=torch.long), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4095 * math.log(8), rel=1e-5)


@pytest.mark.parametrize(
    "logits, labels",
    [
        (torch.zeros(2, 5, VOCAB), torch.zeros(2, 4, dtype=torch.long)),
        (torch.zeros(2, VOCAB), torch.zeros(2, dtype=torch.long)),
    ],
)
def test_rejects_shapes(logits, labels):
    with pytest.raises(ValueError, match="do not shift them"):
        next_token_loss(logits, labels)


def test_rejects_labels():
    logits = torch.zeros(1, 3, VOCAB)
    with pytest.raises(ValueError, match="labels: expected ids in 0 ... 12, got 0 ... 13; or -100"):
        next_token_loss(logits, torch.tensor([[0, 13, 1]]))
    with pytest.raises(ValueError, match="got -1 ... 2"):
        next_token_loss(logits, torch.tensor([[-1, 2, -100]]))
    with pytest.raises(TypeError, match="labels: expected whole numbers"):
        next_token_loss(logits, torch.zeros(1, 3))


def test_rejects_an_unknown_reduction():
    with pytest.raises(ValueError, match="reduction: expected"):
        next_token_loss(torch.zeros(1, 3, VOCAB), torch.zeros(1, 3).long(), reduction="avg")


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 3, 4)], ids=str)
def test_matches_torch_without_a_shift(batch):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch, VOCAB, generator=rng)
    labels = torch.randint(VOCAB, batch, generator=rng)
    if batch:
        labels.view(-1)[0] = IGNORED
    flat = logits.reshape(-1, VOCAB), labels.flatten()
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(*flat, reduction=reduction)
        actual = cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(actual, expected.view(actual.shape))
    assert cross_entropy(logits, torch.full_like(labels, IGNORED)) == 0


def test_rejects_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"expected \(\.\.\., V\) and \(\.\.\.\), got"):
        cross_entropy(torch.zeros(2, 3, VOCAB), torch.zeros(2, dtype=torch.long))
