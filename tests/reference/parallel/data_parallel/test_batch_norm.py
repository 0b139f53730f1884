"""Oracle: torch's BatchNorm on the rows of all ranks together."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.parallel.data_parallel import SyncBatchNorm, convert
from reference.parallel.ranks import run

ROWS = (2, 5, 1)


def whole_and_parts(shape):
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * 2 + 3, (x * 2 + 3).split(ROWS)


def norm(kind, **options):
    torch.manual_seed(1)
    bn = kind(4, **options).double()
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn


@pytest.mark.parametrize(
    "kind, shape", [(nn.BatchNorm1d, (4,)), (nn.BatchNorm1d, (4, 3)), (nn.BatchNorm2d, (4, 2, 3))]
)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_matches_one_rank_with_all_rows(kind, shape, options):
    """Outputs, gradients and running statistics, on ranks with different numbers of rows."""
    whole, parts = whole_and_parts(shape)
    weight = torch.randn(8, *shape, generator=torch.Generator().manual_seed(5)).double()

    def program(comm):
        bn = SyncBatchNorm(norm(kind, **options), comm)
        x = parts[comm.rank].clone().requires_grad_()
        for _ in range(2):
            y = bn(x)
        (y * weight.split(ROWS)[comm.rank]).sum().backward()
        grads = [comm.all_reduce(p.grad) for p in bn.parameters()]
        return y.detach(), x.grad, grads, [b.clone() for b in bn.buffers()]

    done = run(3, program, is_measured=False).results
    alone = norm(kind, **options)
    x = whole.clone().requires_grad_()
    for _ in range(2):
        y = alone(x)
    (y * weight).sum().backward()
    tight = {"rtol": 1e-9, "atol": 1e-9}  # E[x^2] - E[x]^2 loses a few digits of float64's 16
    assert_close(torch.cat([r[0] for r in done]), y.detach(), **tight)
    assert_close(torch.cat([r[1] for r in done]), x.grad, **tight)
    for ours, theirs in zip(done[0][2], alone.parameters(), strict=True):
        assert_close(ours, theirs.grad, **tight)
    for ours, theirs in zip(done[2][3], alone.buffers(), strict=True):
        assert_close(ours, theirs, **tight)


def test_evaluation_uses_running_statistics():
    whole, _ = whole_and_parts((4,))

    def program(comm):
        bn = norm(nn.BatchNorm1d)
        bn.running_mean.fill_(0.5)
        sync = SyncBatchNorm(bn, comm).eval()
        return sync(whole), bn(whole), comm.traffic.total().num_calls

    ours, theirs, calls = run(2, program).results[0]
    assert torch.equal(ours, theirs) and calls == 0


def test_convert_replaces_all():
    def program(comm):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.BatchNorm1d(2))
        alone = convert(nn.BatchNorm1d(2), comm)
        return [type(m).__name__ for m in convert(model, comm).modules()], type(alone).__name__

    names, alone = run(1, program).results[0]
    assert names.count("SyncBatchNorm") == 2 and alone == "SyncBatchNorm"


def test_rejects_other_modules():
    with pytest.raises(TypeError, match="batch_norm: expected a BatchNorm, got LayerNorm"):
        run(1, lambda comm: SyncBatchNorm(nn.LayerNorm(3), comm))
