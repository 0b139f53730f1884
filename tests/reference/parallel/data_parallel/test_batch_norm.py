"""Oracle: torch's BatchNorm on the rows of all ranks together."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from reference.parallel.data_parallel import SyncBatchNorm, convert
from reference.parallel.ranks import run
from tests.tolerances import TOLERANCE

ROWS = (2, 5, 0, 1)


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
    """Outputs, gradients, running statistics; ranks with different numbers of rows, and none."""
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

    done = run(4, program, is_measured=False).results
    alone = norm(kind, **options)
    x = whole.clone().requires_grad_()
    for _ in range(2):
        y = alone(x)
    (y * weight).sum().backward()
    tight = TOLERANCE[torch.float64]
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
        return sync(whole), bn.eval()(whole), comm.traffic.total().num_calls

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


@pytest.mark.parametrize("mean, deviation", [(100, 0.01), (1000, 0.1), (1e4, 1), (-3e5, 10)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_matches_float64_far_from_zero(mean, deviation, num_ranks):
    """tt-metal#45968, tensorflow#25115: one of E[x^2] - E[x]^2 has no right digit here."""
    rng = torch.Generator().manual_seed(0)
    x = mean + deviation * torch.randn(60, 3, generator=rng)

    def program(comm):
        bn = SyncBatchNorm(nn.BatchNorm1d(3, momentum=1), comm)
        return bn(x.tensor_split(comm.size)[comm.rank]).detach(), bn.running_var

    done = run(num_ranks, program, is_measured=False).results
    truth = nn.BatchNorm1d(3, momentum=1).double()
    expected = truth(x.double()).detach()
    spacing = torch.finfo(torch.float32).eps * abs(mean) / deviation  # of float32, in deviations
    ours = torch.cat([y for y, _ in done]).double()
    assert (ours - expected).abs().max() <= 2 * spacing
    assert_close(done[0][1].double(), truth.running_var, rtol=spacing, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_module_half", [False, True])
def test_matches_float32_from_half_precision(dtype, is_module_half):
    """Squares of 300 are beyond float16; the result comes back in the dtype of x, gradients too."""
    x = (300 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))).to(dtype)

    def program(comm):
        bn = norm(lambda n: nn.BatchNorm1d(3)).float()
        bn = SyncBatchNorm(bn.to(dtype) if is_module_half else bn, comm)
        part = x.chunk(2)[comm.rank].clone().requires_grad_()
        y = bn(part)
        y.square().sum().backward()
        assert y.dtype == part.grad.dtype == dtype
        assert all(p.grad.dtype == p.dtype for p in bn.parameters())
        return y.detach(), part.grad, bn.running_var

    done = run(2, program, is_measured=False).results
    bn = norm(lambda n: nn.BatchNorm1d(3)).float()
    if is_module_half:
        bn = bn.to(dtype).float()
    wide = x.float().requires_grad_()
    y = bn(wide)
    y.to(dtype).float().square().sum().backward()
    close = TOLERANCE[dtype]
    assert_close(torch.cat([y for y, _, _ in done]), y.detach().to(dtype), **close)
    gradient = torch.cat([g for _, g, _ in done]).float()
    assert (gradient - wide.grad).abs().max() <= close["rtol"] * y.abs().max() / 10
    assert_close(done[0][2], bn.running_var.to(done[0][2].dtype), **close)


def test_invariant_running_statistics_are_no_nan_after_a_refusal():
    """One value a channel has no unbiased variance: 0 / 0 would stay in the running one."""

    def program(comm, rows):
        bn = SyncBatchNorm(nn.BatchNorm1d(3), comm)
        with pytest.raises(ValueError, match="more than 1 value a channel over all ranks, got"):
            bn(torch.ones(rows[comm.rank], 3))
        bn(torch.ones(2, 3))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            F.batch_norm(torch.ones(1, 3), None, None, training=True)
        return bn.running_var.tolist()

    assert run(2, program, (1, 0)).results == [pytest.approx([0.9] * 3)] * 2
    assert run(2, program, (0, 0)).results == [pytest.approx([0.9] * 3)] * 2
    # A value on each of two ranks is enough.
    y = run(2, lambda c: SyncBatchNorm(nn.BatchNorm1d(3), c)(torch.full((1, 3), float(c.rank))))
    assert [part.sign().tolist() for part in y.results] == [[[-1.0] * 3], [[1.0] * 3]]


def test_invariant_names_and_modes():
    """State by the old names; frozen where a user freezes each BatchNorm."""

    def program(comm):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        before = model.state_dict()
        model = convert(convert(model, comm), comm)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[k], after[k]) for k in after
        )
        model.load_state_dict(before)
        model.double()
        assert model[1].inner.running_mean is model[1].running_mean
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        model(torch.randn(4, 3).double())
        return int(model[1].num_batches_tracked)

    assert run(1, program).results == [0]


def test_rejects_what_batch_norm_rejects():
    def call(x, **options):
        return run(1, lambda comm: SyncBatchNorm(nn.BatchNorm1d(3, **options), comm)(x))

    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        call(torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="x: expected 3 channels, got 4"):
        call(torch.ones(2, 4))
    with pytest.raises(ValueError, match="eps: expected above 0, got 0"):
        call(torch.ones(2, 3), eps=0)
    with pytest.raises(TypeError, match="got a lazy one"):
        run(1, lambda comm: SyncBatchNorm(nn.LazyBatchNorm1d(), comm))
