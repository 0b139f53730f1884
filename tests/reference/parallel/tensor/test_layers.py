"""Oracles: nn.Linear, F.embedding and F.cross_entropy on one rank."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.parallel.ranks import run
from reference.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_ranks,
    gather_positions,
    scatter_sum,
    sum_over_ranks,
    vocab_parallel_cross_entropy,
)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_operators_are_each_others_backward():
    x, grads = draw(3, 2, 6, 4), draw(3, 2, 6, 4, seed=1)

    def program(comm):
        r = comm.rank
        found = []
        for act, given, grad in (
            (copy_to_ranks, x[0], grads[r]),
            (sum_over_ranks, x[r], grads[0]),
            (gather_positions, x[0].chunk(3, 1)[r], grads[r]),
            (scatter_sum, x[r], grads[0].chunk(3, 1)[r]),
        ):
            leaf = given.clone().requires_grad_()
            y = act(leaf, comm)
            y.backward(grad)
            found.append((y.detach(), leaf.grad))
        return found

    for r, found in enumerate(run(3, program).results):
        truth = [
            (x[0], grads.sum(0)),
            (x.sum(0), grads[0]),
            (x[0], grads.sum(0).chunk(3, 1)[r]),
            (x.sum(0).chunk(3, 1)[r], grads[0]),
        ]
        for ours, theirs in zip(found, truth, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert_close(a, b)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_of_linear_layers_matches_the_whole(bias):
    torch.manual_seed(0)
    first, second = nn.Linear(5, 12, bias=bias).double(), nn.Linear(12, 3, bias=bias).double()
    x, grad = draw(4, 5), draw(4, 3)

    def program(comm):
        column, row = ColumnParallelLinear(first, comm), RowParallelLinear(second, comm)
        leaf = x.clone().requires_grad_()
        y = row(torch.relu(column(leaf)))
        comm.traffic.reset()
        y.backward(grad)
        calls = comm.traffic.total().num_calls
        return (
            y.detach(),
            leaf.grad,
            [p.grad for p in [*column.parameters(), *row.parameters()]],
            calls,
        )

    leaf = x.clone().requires_grad_()
    y = second(torch.relu(first(leaf)))
    y.backward(grad)
    for rank, (ours, dx, grads, calls) in enumerate(run(2, program).results):
        assert_close(ours, y.detach())
        assert_close(dx, leaf.grad)
        assert calls == 1
        assert_close(grads[0], first.weight.grad.chunk(2)[rank])
        if bias:
            assert_close(grads[1], first.bias.grad.chunk(2)[rank])
            assert {tuple(g.shape): g for g in grads}[3,].equal(second.bias.grad)
        weight = next(g for g in grads if g.shape == (3, 6))
        assert_close(weight, second.weight.grad.chunk(2, 1)[rank])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_embedding_matches_the_whole(world_size):
    weight, tokens = draw(8, 3), torch.tensor([[0, 7, 3], [3, 3, 5]])
    grad = draw(2, 3, 3)

    def program(comm):
        layer = VocabParallelEmbedding(weight, comm)
        y = sum_over_ranks(layer(tokens), comm)
        y.backward(grad)
        return y.detach(), comm.all_gather(layer.weight.grad)

    leaf = weight.clone().requires_grad_()
    F.embedding(tokens, leaf).backward(grad)
    for y, found in run(world_size, program).results:
        assert torch.equal(y, weight[tokens])
        assert_close(found, leaf.grad)


def divided_loss(comm, logits, targets, grad=None):
    """The loss of a rank's part of the logits, and its gradient; by default of the sum."""
    part = logits.chunk(comm.size, -1)[comm.rank].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(part, targets, comm)
    loss.backward(torch.ones_like(loss) if grad is None else grad)
    return loss.detach(), part.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_matches_the_whole(world_size, scale):
    """Large logits would overflow without the shift by the largest of all ranks."""
    logits = draw(2, 3, 8) * scale
    targets, grad = torch.tensor([[0, 7, 3], [4, 4, 5]]), draw(2, 3)

    def program(comm):
        return divided_loss(comm, logits, targets, grad)

    whole = logits.clone().requires_grad_()
    truth = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    truth.backward(grad)
    done = run(world_size, program).results
    assert_close(done[0][0], truth.detach(), rtol=1e-11, atol=1e-11)
    assert_close(torch.cat([r[1] for r in done], -1), whole.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("ignored", [(), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_cross_entropy_matches_ignored_targets(world_size, ignored):
    """Loss and gradient of -100 are 0, even where a wrong logit would make them NaN."""
    logits, grad = draw(6, 8), draw(6)
    targets = torch.tensor([0, 7, 3, 4, 4, 5])
    for i in ignored:
        targets[i] = -100
        grad[i] = torch.inf

    def program(comm):
        return divided_loss(comm, logits, targets, grad)

    whole = logits.clone().requires_grad_()
    truth = F.cross_entropy(whole, targets, reduction="none")
    truth.backward(grad.masked_fill(targets == -100, 0))
    done = run(world_size, program).results
    assert_close(done[0][0], truth.detach(), rtol=1e-12, atol=1e-12)
    assert_close(torch.cat([r[1] for r in done], -1), whole.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_matches_float32_in_half_precision(dtype):
    """As Megatron-LM: a sum of 4,000 exponentials stalls in 16 bits; the gradient is 16 bits."""
    logits = (draw(3, 4000) / 4).to(dtype)
    targets = torch.tensor([5, 3999, -100])

    def program(comm):
        return divided_loss(comm, logits, targets)

    whole = logits.float().requires_grad_()
    truth = F.cross_entropy(whole, targets, reduction="none")
    truth.sum().backward()
    done = run(2, program).results
    assert done[0][0].dtype == torch.float32
    assert_close(done[0][0], truth.detach(), rtol=1e-5, atol=1e-5)
    assert_close(torch.cat([r[1] for r in done], -1), whole.grad.to(dtype))


def test_cross_entropy_matches_forbidden_and_huge_logits():
    """-inf forbids a token, on the first place of a rank too; 1e30 is no overflow."""
    logits = draw(4, 8)
    logits[0, :4] = -torch.inf
    logits[1, 4] = logits[2, 0] = -torch.inf
    logits[3] = torch.tensor([1e30, 0, 0, 1e30, -1e30, 0, 0, 0])
    targets = torch.tensor([6, 1, 5, 3])

    def program(comm):
        return divided_loss(comm, logits, targets)

    whole = logits.clone().requires_grad_()
    truth = F.cross_entropy(whole, targets, reduction="none")
    truth.sum().backward()
    for world_size in (1, 2, 4):
        done = run(world_size, program).results
        assert_close(done[0][0], truth.detach(), rtol=1e-12, atol=1e-12)
        assert_close(torch.cat([r[1] for r in done], -1), whole.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", [8, -1, -99, 100])
def test_cross_entropy_rejects_targets_outside_the_vocabulary(target):
    """torch does; without a check the loss is finite and wrong."""
    with pytest.raises(ValueError, match="targets: expected ids in 0 ... 7, got"):
        run(2, lambda c: vocab_parallel_cross_entropy(draw(1, 4), torch.tensor([target]), c))


def test_cross_entropy_rejects_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets: expected shape \(2,\), got \(3,\)"):
        run(1, lambda c: vocab_parallel_cross_entropy(draw(2, 4), torch.zeros(3).long(), c))


def test_traffic_of_the_loss_does_not_depend_on_the_vocabulary():
    def program(comm, v):
        vocab_parallel_cross_entropy(draw(5, v), torch.zeros(5).long(), comm)
        return comm.traffic.total().payload_bytes

    assert run(2, program, 4).results == run(2, program, 400).results == [5 * 8 * 3] * 2
