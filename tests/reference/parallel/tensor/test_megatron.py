"""The oracle: Megatron-LM's own layers on two processes, each cutting the same whole weights.

Texts are one row, so that its layout (positions first) has our order of sums, and in float32 most
values are equal to the bit.
"""

import sys
import types

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
    column_part,
    copy_to_ranks,
    gather_positions,
    row_part,
    scatter_sum,
    sum_over_ranks,
    vocab_parallel_cross_entropy,
)
from tests.oracles import enter, needs
from tests.tolerances import TOLERANCE
from tools.fetch_oracles import MEGATRON

pytestmark = [needs(MEGATRON), pytest.mark.slow]

B, T, D, F_, V = 1, 6, 8, 12, 10
LOSSES = [(1.0, torch.float32), (300.0, torch.float32), (10.0, torch.bfloat16)]
TOKENS = torch.tensor([[0, 9, 4, 5, 5, 3]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_layers():
    torch.manual_seed(0)
    return nn.Linear(D, F_), nn.Linear(F_, D)


def import_megatron(comm):
    """Its tensor parallelism alone, since `megatron.core` by itself imports all else, for 10 s."""
    folder = enter(MEGATRON)
    for name in ("megatron", "megatron.core"):
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    torch.compile = lambda function=None, **_: function  # for activations that nobody calls here
    from megatron.core import parallel_state, tensor_parallel

    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=comm.size)
    return tensor_parallel


def config_of(*, sequence_parallel):
    from megatron.core.model_parallel_config import ModelParallelConfig

    return ModelParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )


def init_from(whole):
    """Megatron draws a whole weight and cuts it: here the weight is given."""
    return lambda weight: weight.data.copy_(whole)


def positions_first(x):
    return x.transpose(0, 1).contiguous()


def mine(x, comm, is_part):
    """What enters a rank: its positions of (B, T, D), or all."""
    return x.chunk(comm.size, 1)[comm.rank] if is_part else x


def our_pair(comm, is_part):
    """Output and gradients of a column- and a row-parallel layer with GELU between them."""
    first, second = whole_layers()
    x = mine(draw(B, T, D), comm, is_part).clone().requires_grad_()
    if is_part:
        column, row = column_part(first, comm), row_part(second, comm)
        bias = nn.Parameter(second.bias.detach().clone())
        h = row(F.gelu(column(gather_positions(x, comm))))
        y = scatter_sum(h, comm) + copy_to_ranks(bias, comm)
    else:
        column, row = ColumnParallelLinear(first, comm), RowParallelLinear(second, comm)
        y, bias = row(F.gelu(column(x))), row.bias
    y.backward(mine(draw(B, T, D, seed=1), comm, is_part))
    grads = (x, column.weight, column.bias, row.weight, bias)
    return [y.detach(), *(p.grad for p in grads)]


def their_pair(megatron, comm, is_part):
    first, second = whole_layers()
    config = config_of(sequence_parallel=is_part)
    column = megatron.ColumnParallelLinear(
        D, F_, config=config, init_method=init_from(first.weight), gather_output=False
    )
    row = megatron.RowParallelLinear(
        F_, D, config=config, init_method=init_from(second.weight), bias=True,
        input_is_parallel=True, skip_bias_add=False,
    )  # fmt: skip
    column.bias.data.copy_(first.bias.chunk(comm.size)[comm.rank])
    row.bias.data.copy_(second.bias)
    x = positions_first(mine(draw(B, T, D), comm, is_part)).requires_grad_()
    y = row(F.gelu(column(x)[0]))[0]
    y.backward(positions_first(mine(draw(B, T, D, seed=1), comm, is_part)))
    if row.bias.sequence_parallel:
        comm.all_reduce(row.bias.grad)  # its trainer's finalize_model_grads does
    grads = (column.weight, column.bias, row.weight, row.bias)
    return [positions_first(y.detach()), positions_first(x.grad), *(p.grad for p in grads)]


def our_embedding(comm, is_part):
    layer = VocabParallelEmbedding(draw(V, D), comm)
    y = (scatter_sum if is_part else sum_over_ranks)(layer(TOKENS), comm)
    y.backward(mine(draw(B, T, D, seed=1), comm, is_part))
    return [y.detach(), layer.weight.grad]


def their_embedding(megatron, comm, is_part):
    layer = megatron.VocabParallelEmbedding(
        V, D, init_method=init_from(draw(V, D)), reduce_scatter_embeddings=is_part,
        config=config_of(sequence_parallel=is_part),
    )  # fmt: skip
    y = layer(TOKENS)
    y = positions_first(y) if is_part else y
    y.backward(mine(draw(B, T, D, seed=1), comm, is_part))
    return [y.detach(), layer.weight.grad]


def loss_of(cross_entropy, comm, scale, dtype):
    logits = (
        (draw(B, T, V) * scale)
        .chunk(comm.size, -1)[comm.rank]
        .to(dtype, copy=True)
        .requires_grad_()
    )
    # A copy: theirs writes over float32 logits.
    loss = cross_entropy(logits.clone(), TOKENS)
    loss.backward(draw(B, T, seed=1))
    return [loss.detach(), logits.grad]


def program(comm):
    """(ours, theirs) of everything, by name."""
    megatron = import_megatron(comm)
    found = {}
    for is_part in (False, True):
        found["layers", is_part] = our_pair(comm, is_part), their_pair(megatron, comm, is_part)
        found["embedding", is_part] = (
            our_embedding(comm, is_part),
            their_embedding(megatron, comm, is_part),
        )
    for case in LOSSES:
        found["loss", case] = (
            loss_of(lambda z, y: vocab_parallel_cross_entropy(z, y, comm), comm, *case),
            loss_of(megatron.vocab_parallel_cross_entropy, comm, *case),
        )
    return found


@pytest.fixture(scope="module")
def results():
    return run(2, program, backend="processes", is_measured=False).results


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_match_megatron(results, sequence_parallel):
    for found in results:
        assert_close(*found["layers", sequence_parallel], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_embedding_matches_megatron_bit_for_bit(results, sequence_parallel):
    for found in results:
        assert_close(*found["embedding", sequence_parallel], rtol=0, atol=0)


@pytest.mark.parametrize("case", LOSSES)
def test_cross_entropy_matches_megatron(results, case):
    """Both give float32 losses of 16-bit logits, and gradients in the logits' dtype."""
    for found in results:
        (loss, grad), (their_loss, their_grad) = found["loss", case]
        assert_close(loss, their_loss, **TOLERANCE[torch.float32])
        assert_close(grad, their_grad, **TOLERANCE[case[1]])
