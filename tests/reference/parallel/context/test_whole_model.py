"""Oracle: the whole text through the whole Llama on one rank."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.parallel.context import ContextParallel
from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.positions import RopeScaling
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16
)
TOKENS = torch.randint(0, 32, (2, 17), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:].clone()
TARGETS[0, 3:] = -100  # a short text: ranks have different numbers of counted tokens
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def fresh(**changes):
    torch.manual_seed(1)
    model = Llama(dataclasses.replace(CONFIG, **changes)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def one_rank(model):
    logits = model(INPUTS)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("num_ranks, num_ulysses", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_matches_one_rank(num_ranks, num_ulysses, layout):
    """Logits, the loss over all counted tokens, and every gradient."""
    model = fresh()

    def program(comm):
        part = copy.deepcopy(model)
        context = ContextParallel(comm, layout=layout, num_ulysses=num_ulysses)
        logits = context.logits(part, context.part(INPUTS))
        share = context.loss(logits, context.part(TARGETS))
        share.backward()
        context.sum_gradients(part.parameters())
        loss = comm.all_reduce(share.detach().clone())
        return context.whole(logits), loss, {n: p.grad for n, p in part.named_parameters()}

    logits, loss, grads = one_rank(copy.deepcopy(model))
    for ours, share, found in run(num_ranks, program, is_measured=False).results:
        assert_close(ours, logits, **CLOSE)
        assert_close(share, loss, **CLOSE)
        for name in grads:
            assert_close(found[name], grads[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_composes_with_tensor_and_data_parallel(sequence_parallel):
    """dp 2 x cp 2 x tp 2: gradients are a mean over dp, a sum over cp."""
    model = fresh()
    tokens, targets = INPUTS, TOKENS[:, 1:]

    def program(comm):
        mesh = comm.mesh(dp=2, cp=2, tp=2)
        context = ContextParallel(mesh.cp)
        part = parallelize(
            copy.deepcopy(model), mesh.tp, sequence_parallel=sequence_parallel
        )  # fmt: skip
        rows = [context.part(x.chunk(2)[mesh.dp.rank]) for x in (tokens, targets)]
        logits = context.logits(part, rows[0])
        losses = vocab_parallel_cross_entropy(logits, rows[1], mesh.tp)
        context.share_of_mean(losses).backward()
        context.sum_gradients(part.parameters())
        for p in part.parameters():
            mesh.dp.all_reduce(p.grad, "mean")
        return part.whole(lambda p: p.grad)

    truth = copy.deepcopy(model)
    F.cross_entropy(truth(tokens).flatten(0, 1), targets.flatten()).backward()
    for found in run(8, program, is_measured=False).results:
        for name, p in truth.named_parameters():
            assert_close(found[name], p.grad, **CLOSE, msg=name)


def test_knows_the_length_of_the_whole_text():
    """Dynamic NTK stretches by the length of the text, which no rank's part shows."""
    scaling = RopeScaling("dynamic", factor=2.0, original_max_position_embeddings=8)
    model = fresh(rope_scaling=scaling)

    def program(comm):
        context = ContextParallel(comm, layout="contiguous")
        return context.whole(context.logits(model, context.part(INPUTS)))

    with torch.no_grad():
        assert_close(run(2, program, is_measured=False).results[0], model(INPUTS), **CLOSE)


def test_matches_on_processes():
    def program(comm):
        part = fresh()
        context = ContextParallel(comm)
        context.loss(context.logits(part, context.part(INPUTS)), context.part(TARGETS)).backward()
        context.sum_gradients(part.parameters())
        return [p.grad for p in part.parameters()]

    simulated, real = (
        run(2, program, backend=b, is_measured=False).results for b in ("simulated", "processes")
    )
    for ours, found in zip(simulated, real, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, found, strict=True))


def test_no_counted_token_gives_zero():
    def program(comm):
        context = ContextParallel(comm)
        logits = torch.zeros(1, 4, 8, requires_grad=True)
        share = context.loss(logits, torch.full((1, 4), -100))
        share.backward()
        return share.item(), logits.grad.abs().max().item()

    assert run(2, program).results == [(0.0, 0.0)] * 2


def held_after_forward(comm, kind, seq_len, num_layers):
    """Parameters, and all that is kept for backward, of a rank."""
    config = dataclasses.replace(
        CONFIG, dim=64, hidden_dim=128, num_heads=8, num_kv_heads=8, num_layers=num_layers,
        max_seq_len=seq_len,
    )  # fmt: skip
    model, tokens = Llama(config), torch.zeros(1, seq_len, dtype=torch.long)
    if kind == "cp":
        context = ContextParallel(comm, block_size=32)
        logits = context.logits(model, context.part(tokens))
    else:
        from reference.flash_attention import flash_attention

        model = parallelize(model, comm, sequence_parallel=True)

        def attend(q, k, v, mask):
            return flash_attention(q, k, v, is_causal=True, block_q=32, block_k=32)

        logits = model(tokens, attend=attend)
    comm.memory.label(list(model.parameters()), "parameters")
    use = comm.memory.use.current
    assert logits.requires_grad
    return use["parameters"], use["activations"] + use["communication_buffers"]


def test_divides_all_activations_where_sequence_parallelism_gathers():
    """Of one layer's activations context parallelism keeps 1/N; a region's gathered input does not
    fall with N under tensor and sequence parallelism. Parameters are the other way round."""
    layer = {}
    for kind in ("cp", "tp"):
        for n in (1, 2, 4):
            one, two = (
                run(n, held_after_forward, kind, 128, layers).results[0] for layers in (1, 2)
            )
            layer[kind, n] = [b - a for a, b in zip(one, two, strict=True)]
    for n in (2, 4):
        assert layer["cp", n][1] == pytest.approx(layer["cp", 1][1] / n, rel=0.02)
        assert layer["cp", n][0] == layer["cp", 1][0]
        stream = 128 * 64 * 4
        # Both regions' inputs, whole, and 1/N of all else.
        expected = layer["tp", 1][1] / n + 2 * stream * (1 - 1 / n)
        assert layer["tp", n][1] == pytest.approx(expected, rel=0.02)
        norms = 2 * 64 * 4
        assert layer["tp", n][0] == (layer["tp", 1][0] - norms) / n + norms


def test_rejects():
    def call(program):
        return run(2, program)

    with pytest.raises(ValueError, match="num_ulysses: expected a divisor of 2, the number of ra"):
        call(lambda comm: ContextParallel(comm, num_ulysses=3))
    with pytest.raises(ValueError, match="keys: expected ring or gathered, got 'star'"):
        call(lambda comm: ContextParallel(comm, keys="star"))
    with pytest.raises(ValueError, match="mask: expected None, causal by position"):
        call(
            lambda comm: ContextParallel(comm).attend(*[torch.zeros(1, 1, 2, 2)] * 3, torch.ones(2))
        )
    with pytest.raises(
        ValueError, match="at most 16 on all ranks together, the model's context, g"
    ):
        call(lambda comm: ContextParallel(comm).logits(fresh(), torch.zeros(1, 9).long()))
    with pytest.raises(ValueError, match="multiple of 2, the number of ranks, got 9; pad the text"):
        call(lambda comm: ContextParallel(comm, num_ulysses=2).positions(9))
