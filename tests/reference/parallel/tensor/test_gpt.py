"""Oracles: one rank with torch's own functions; the memory ledger against published formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from reference.parallel.ranks import run
from reference.parallel.tensor import (
    GPTLayer,
    ParallelGPTLayer,
    RandomStreams,
    dropout,
    layer_activation_bytes,
)


def fresh(dim=16, num_heads=4, dtype=torch.float64):
    torch.manual_seed(0)
    layer = GPTLayer(dim, num_heads)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer.to(dtype)


def plain(layer, x):
    """The layer by torch's own functions, without dropout."""
    h = layer.norms[0](x)
    q, k, v = (
        part(h).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for part in (layer.q, layer.k, layer.v)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + layer.out(heads.transpose(1, 2).flatten(2))
    return x + layer.down(F.gelu(layer.up(layer.norms[1](x))))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_matches_one_rank_without_dropout(world_size, sequence_parallel):
    """Biases once, norms' gradients whole."""
    layer = fresh()
    x, grad = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(1)).double()

    def program(comm):
        part = ParallelGPTLayer(
            copy.deepcopy(layer), comm, RandomStreams(comm, 0), rate=0.0,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
        cut = (lambda t: t.chunk(comm.size, 1)[comm.rank]) if sequence_parallel else (lambda t: t)
        leaf = cut(x).clone().requires_grad_()
        y = part(leaf)
        y.backward(cut(grad))
        alike = [part.out.bias, part.down.bias, part.norms[0].weight, part.norms[1].bias]
        return y.detach(), leaf.grad, [p.grad for p in alike], part.up.weight.grad

    leaf = x.clone().requires_grad_()
    y = plain(layer, leaf)
    y.backward(grad)
    truth = [layer.out.bias, layer.down.bias, layer.norms[0].weight, layer.norms[1].bias]
    done = run(world_size, program).results
    join = (lambda ts: torch.cat(ts, 1)) if sequence_parallel else (lambda ts: ts[0])
    assert_close(join([r[0] for r in done]), y.detach(), rtol=1e-10, atol=1e-10)
    assert_close(join([r[1] for r in done]), leaf.grad, rtol=1e-10, atol=1e-10)
    for r in done:
        for ours, theirs in zip(r[2], truth, strict=True):
            assert_close(ours, theirs.grad, rtol=1e-10, atol=1e-10)
    assert_close(torch.cat([r[3] for r in done]), layer.up.weight.grad, rtol=1e-10, atol=1e-10)


def test_streams_agree_where_they_must_and_differ_where_they_must():
    def program(comm):
        streams = RandomStreams(comm, seed=5)
        return torch.rand(8, generator=streams.shared), torch.rand(8, generator=streams.own)

    done = run(3, program).results
    assert all(torch.equal(shared, done[0][0]) for shared, _ in done)
    assert len({tuple(own.tolist()) for _, own in done} | {tuple(done[0][0].tolist())}) == 4


def test_replicas_stay_equal_under_dropout():
    """The stream that all hold is dropped alike, and its gradient too."""
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).double()

    def program(comm):
        part = ParallelGPTLayer(fresh(), comm, RandomStreams(comm, 0), rate=0.3)
        leaf = x.clone().requires_grad_()
        y = part(leaf)
        y.sum().backward()
        return y.detach(), leaf.grad

    first, *others = run(4, program).results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert (first[0] == x).any()  # something was dropped


def test_dropout_keeps_the_mean_and_the_rate():
    x = torch.ones(100_000)
    y = dropout(x, 0.25, torch.Generator().manual_seed(0))
    # Four standard deviations of a binomial share.
    assert abs((y == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(x))
    assert y[y > 0].unique().tolist() == pytest.approx([4 / 3])
    assert dropout(x, 0.0, torch.Generator()) is x


def test_rejects_rates_and_heads():
    with pytest.raises(ValueError, match="rate: expected 0 <= rate < 1, got 1"):
        dropout(torch.ones(2), 1.0, torch.Generator())
    with pytest.raises(ValueError, match="num_heads: expected a multiple of 3, got 4"):
        run(3, lambda comm: ParallelGPTLayer(fresh(), comm, RandomStreams(comm, 0)))


@pytest.mark.parametrize(
    "world_size, sequence_parallel", [(1, False), (2, False), (4, False), (4, True)]
)
def test_ledger_equals_the_published_formula(world_size, sequence_parallel):
    """What a layer keeps on a rank between forward and backward, in 16 bits with byte masks.

    With sequence parallelism ours also keeps the gathered inputs of its two regions, which the
    paper's gathers again in backward. Norms' means and deviations are within one per cent.
    """
    seq_len, batch, dim, num_heads = 64, 2, 64, 4
    x = torch.randn(batch, seq_len, dim, generator=torch.Generator().manual_seed(0)).bfloat16()

    def program(comm):
        streams = RandomStreams(comm, 0)
        part = ParallelGPTLayer(
            fresh(dim, num_heads, torch.bfloat16), comm, streams, rate=0.1,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
        mine = x.chunk(comm.size, 1)[comm.rank] if sequence_parallel else x
        leaf = (mine * 1).requires_grad_()  # its own storage: the layer's input
        comm.memory.label(list(part.parameters()), "parameters")
        y = part(leaf)
        use = comm.memory.use.current
        held = use["activations"] + use["communication_buffers"]
        return held - y.nbytes

    held = run(world_size, program).results[0]
    formula = layer_activation_bytes(
        seq_len, batch, dim, num_heads, num_ranks=world_size, sequence_parallel=sequence_parallel
    )
    gathered = 2 * 2 * seq_len * batch * dim * (1 - 1 / world_size) if sequence_parallel else 0
    causal_mask = seq_len**2  # one byte each, once for all heads; not in the formula
    assert held == pytest.approx(formula + gathered + causal_mask, rel=0.01)


@pytest.mark.parametrize(
    "seq_len, batch, dim, num_heads, expected",
    [(2048, 1, 12288, 96, 80), (2048, 1, 20480, 128, 64)],
)
def test_attention_term_matches_the_paper(seq_len, batch, dim, num_heads, expected):
    """Section 5: 5 a s / h is 80 for GPT-3 and 64 for MT-NLG."""
    size = seq_len * batch * dim
    whole = layer_activation_bytes(seq_len, batch, dim, num_heads) / size
    without = layer_activation_bytes(seq_len, batch, dim, num_heads, recompute="selective") / size
    assert (without, whole - without) == (34, expected)


def test_full_recomputation_keeps_the_input_of_a_layer():
    """With sequence parallelism it is this rank's positions: 2 bytes of each of s b h / t."""
    for sequence_parallel, t in ((False, 1), (True, 8)):
        kept = layer_activation_bytes(
            64, 2, 32, 8, num_ranks=8, recompute="full", sequence_parallel=sequence_parallel
        )
        assert kept == 2 * 64 * 2 * 32 / t


def test_formula_rejects():
    with pytest.raises(ValueError, match="num_ranks: expected at least 1, got 0"):
        layer_activation_bytes(8, 1, 8, 1, num_ranks=0)
    with pytest.raises(ValueError, match="recompute: expected none, selective or full, got 'some'"):
        layer_activation_bytes(8, 1, 8, 1, recompute="some")
