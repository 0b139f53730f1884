import copy

import pytest
import torch
from torch import nn

from reference.mixed_precision import (
    LossScaler,
    MasterWeights,
    ScaleRule,
    mixed_precision_step,
    training_state_bytes,
    widened,
)


def regression(dtype: torch.dtype, *, width: int = 16) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))
    return model.to(dtype), torch.randn(64, width)


def loss_of(model, x):
    dtype = next(model.parameters()).dtype
    return lambda: model(x.to(dtype)).float().square().mean()


def test_matches_plain_training_in_float32():
    model, x = regression(torch.float32)
    twin = copy.deepcopy(model)
    master = MasterWeights(model)
    optimizer = torch.optim.AdamW(master.parameters, lr=0.01, foreach=False)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, foreach=False)
    for _ in range(10):
        mixed_precision_step(loss_of(model, x), master, optimizer, LossScaler(), max_norm=0.5)
        plain.zero_grad()
        loss_of(twin, x)().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
    for ours, theirs in zip(master.parameters, twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # a power of two is taken off without rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32(dtype):
    losses = {}
    for kind in (torch.float32, dtype):
        model, x = regression(kind)
        master = MasterWeights(model)
        optimizer = torch.optim.AdamW(master.parameters, lr=0.01)
        scaler = LossScaler(init_scale=1024.0)
        reports = [
            mixed_precision_step(loss_of(model, x), master, optimizer, scaler) for _ in range(50)
        ]
        losses[kind] = [r.loss for r in reports]
        assert all(r.has_stepped for r in reports)
    assert losses[dtype][-1] < 0.5 * losses[dtype][0]
    assert losses[dtype][-1] == pytest.approx(losses[torch.float32][-1], rel=0.1)


def test_master_weights_keep_small_updates():
    model = nn.Linear(1, 1, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(1.0)
    master = MasterWeights(model)
    for _ in range(100):
        with torch.no_grad():
            model.weight -= 1e-4  # below half a spacing of float16 under 1: 2^-12
            master.parameters[0] -= 1e-4
    assert model.weight.item() == 1.0
    master.write_to_model()
    assert model.weight.item() == pytest.approx(0.99, abs=2**-11)


def test_an_overflow_skips_the_update_and_the_schedule():
    model, x = regression(torch.float16)
    master = MasterWeights(model)
    optimizer = torch.optim.SGD(master.parameters, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    before = [p.clone() for p in master.parameters]
    scaler = LossScaler(init_scale=2.0**40, rule=ScaleRule(backoff_factor=2.0**-30))
    skipped = mixed_precision_step(loss_of(model, x), master, optimizer, scaler, schedule=schedule)
    assert not skipped.has_stepped and skipped.scale == 2.0**40
    assert all(torch.equal(a, b) for a, b in zip(before, master.parameters, strict=True))
    assert schedule.get_last_lr() == [1.0] and scaler.state.scale == 2.0**10
    done = mixed_precision_step(loss_of(model, x), master, optimizer, scaler, schedule=schedule)
    assert done.has_stepped and schedule.get_last_lr() == [0.1]


def test_frozen_parameters_have_no_master():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    master = MasterWeights(model)
    assert [p.shape for p in master.parameters] == [(2, 2), (2,)]
    assert all(p.dtype == torch.float32 for p in master.parameters)


def test_an_unused_parameter_keeps_no_gradient():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    master = MasterWeights(model)
    model[0](torch.ones(1, 2)).sum().backward()
    master.collect_gradients()
    assert [p.grad is None for p in master.parameters] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_matches_the_published_sixteen_bytes():
    mixed = training_state_bytes(weight_bits=16, gradient_bits=16, has_master=True)
    plain = training_state_bytes(weight_bits=32, gradient_bits=32, has_master=False)
    assert mixed == plain == 16  # ZeRO, arXiv 1910.02054, sec. 3.1: 2 + 2 + K with K = 12


def test_widened_joins_all_values():
    flat = widened([torch.ones(2, 2, dtype=torch.float16), torch.zeros(3)])
    assert flat.tolist() == [1.0] * 4 + [0.0] * 3 and flat.dtype == torch.float32


def test_rejects_a_model_without_parameters():
    with pytest.raises(ValueError, match="trainable parameters"):
        MasterWeights(nn.ReLU())


def test_rejects_a_half_precision_loss():
    model, x = regression(torch.float16)
    master = MasterWeights(model)
    optimizer = torch.optim.SGD(master.parameters, lr=1.0)
    with pytest.raises(TypeError, match=r"got torch.float16; use logits.float\(\)"):
        mixed_precision_step(lambda: model(x.half()).mean(), master, optimizer, LossScaler())


def test_rejects_widths_of_part_bytes():
    with pytest.raises(ValueError, match="gradient_bits: expected a positive multiple of 8, got 4"):
        training_state_bytes(weight_bits=16, gradient_bits=4, has_master=True)
