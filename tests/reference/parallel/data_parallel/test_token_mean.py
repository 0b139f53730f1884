"""Oracle: torch's cross-entropy over all tokens at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.parallel.data_parallel import DDP, TokenMean, token_mean
from reference.parallel.ranks import run
from tests.tolerances import TOLERANCE

VOCABULARY = 7
CLOSE = TOLERANCE[torch.float64]


def batch(kind):
    """Eight rows; -100 in different numbers, in whole rows, or everywhere."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(8, 5, 4, generator=rng, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (8, 5), generator=rng)
    if kind == "uneven":
        for row in range(8):
            targets[row, : row % 5] = -100
    if kind == "half empty":
        targets[:4] = -100
    if kind == "empty":
        targets[:] = -100
    return x, targets


def head():
    torch.manual_seed(0)
    return nn.Linear(4, VOCABULARY).double()


def losses(model, x, targets):
    return F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), reduction="none")


def whole(kind):
    """Loss and gradients of one rank with everything; 0 where nothing counts."""
    model, (x, targets) = head(), batch(kind)
    total = losses(model, x, targets).sum() / max(1, int((targets != -100).sum()))
    if kind != "empty":
        mean = F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
        assert_close(total, mean, **CLOSE)
    total.backward()
    return total.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["even", "uneven", "half empty", "empty"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("is_ddp", [False, True])
def test_matches_one_rank_on_ranks_and_micro_batches(kind, num_micro, is_ddp):
    """Summed gradients, and DDP's averaged ones, which a mean of means gets wrong
    (transformers#34191, torchtitan#2206, mlx-lm#1413)."""

    def program(comm):
        mesh = comm.mesh(dp=2, cp=2)
        x, targets = (t.chunk(2)[mesh.dp.rank] for t in batch(kind))
        x, targets = (t.tensor_split([2], 1)[mesh.cp.rank] for t in (x, targets))
        inner = head()
        model = DDP(inner, comm) if is_ddp else inner
        mean = token_mean(targets, mesh.dp, mesh.cp, averaged_by=4 if is_ddp else 1)
        total = 0
        for i, (a, b) in enumerate(zip(x.chunk(num_micro), targets.chunk(num_micro), strict=True)):
            if is_ddp and i + 1 < num_micro:
                with model.no_sync():
                    share = mean.share(losses(model, a, b), b)
                    share.backward()
            else:
                share = mean.share(losses(model, a, b), b)
                share.backward()
            total += share.detach()
        grads = [p.grad if is_ddp else comm.all_reduce(p.grad) for p in inner.parameters()]
        return comm.all_reduce(total, "mean" if is_ddp else "sum"), grads

    loss, truth = whole(kind)
    for found, grads in run(4, program, is_measured=False).results:
        assert_close(found, loss, **CLOSE)
        for ours, expected in zip(grads, truth, strict=True):
            assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matches_float32_for_half_precision(dtype):
    """A sum of 4,000 losses of 20 is beyond float16."""
    values = torch.full((4000,), 20.0, dtype=dtype, requires_grad=True)
    share = token_mean(torch.zeros(4000).long()).share(values, torch.zeros(4000).long())
    share.backward()
    assert share.dtype == torch.float32 and share.item() == pytest.approx(20)
    assert_close(values.grad, torch.full_like(values, 1 / 4000))


def test_counts_masks_and_numbers():
    mask = torch.tensor([[True, False], [True, True]])
    values = torch.tensor([1.0, torch.nan, 2.0, 3.0], requires_grad=True)
    share = token_mean(mask).share(values, mask)
    share.backward()
    assert share.item() == 2 and values.grad.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert token_mean(torch.zeros(3, 2)).count == 6
    assert token_mean(torch.tensor([-100, -1, 0])).count == 2


def test_matches_without_values():
    """A run on shapes alone."""

    def program(comm):
        mean = token_mean(torch.zeros(4, dtype=torch.long), comm)
        return mean.share(torch.zeros(4), torch.zeros(4, dtype=torch.long)).shape

    assert run(2, program, shapes_only=True).results == [torch.Size([])] * 2


def test_rejects_a_mean_and_a_wrong_divisor():
    targets = torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=r"losses: expected one for each of the targets, 6 of sha"):
        token_mean(targets).share(torch.tensor(1.0), targets)
    with pytest.raises(ValueError, match="averaged_by: expected at least 1, got 0"):
        token_mean(targets, averaged_by=0)
    with pytest.raises(ValueError, match="averaged_by: expected at least 1, got -1"):
        TokenMean(torch.tensor(1.0), averaged_by=-1)
