import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.mixed_precision import LossScaler, ScaleRule, ScaleState, next_scale, unscale_


def fill(parameter: torch.Tensor, overflow: bool) -> None:
    parameter.grad = torch.full_like(parameter, torch.inf if overflow else 2.0)


def trajectories(overflows, interval, init_scale=1024.0):
    """(scale, weight) after each step, by GradScaler and by ours, on the same fake gradients."""
    settings = dict(init_scale=init_scale, growth_interval=interval)
    theirs = torch.amp.GradScaler("cpu", **settings)
    ours = LossScaler(init_scale=init_scale, rule=ScaleRule(growth_interval=interval))
    history = []
    for scaler in (theirs, ours):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        seen = []
        for overflow in overflows:
            scaler.scale(torch.ones(()))  # GradScaler makes its state lazily
            fill(weight, overflow)
            scaler.step(optimizer)
            scaler.update()
            scale = scaler.get_scale() if scaler is theirs else scaler.state.scale
            seen.append((scale, weight.tolist()))
        history.append(seen)
    return history


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_matches_grad_scaler(overflows, interval):
    theirs, ours = trajectories(overflows, interval)
    assert ours == theirs


@pytest.mark.parametrize("init_scale", [3.0, 2.0**127, 1e-37])
def test_matches_grad_scaler_at_odd_scales(init_scale):
    theirs, ours = trajectories([False] * 5 + [True] * 3, 1, init_scale)
    assert ours == theirs


def test_matches_grad_scaler_in_a_training_with_clipping():
    weights = []
    for scaler in (torch.amp.GradScaler("cpu"), LossScaler()):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        for _ in range(20):
            optimizer.zero_grad()
            x = torch.randn(32, 8)
            scaler.scale(model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)
            scaler.step(optimizer)
            scaler.update()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_matches_grad_scaler_for_two_optimizers_of_which_one_overflows():
    results = []
    for scaler in (torch.amp.GradScaler("cpu"), LossScaler()):
        scaler.scale(torch.ones(()))
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizers = [torch.optim.SGD([w], lr=1e-3) for w in weights]
        for weight, optimizer, overflow in zip(weights, optimizers, (True, False), strict=True):
            fill(weight, overflow)
            scaler.step(optimizer)
        scaler.update()
        scale = scaler.get_scale() if hasattr(scaler, "get_scale") else scaler.state.scale
        results.append((scale, [w.tolist() for w in weights]))
    assert results[0] == results[1]


def test_step_tells_whether_the_optimizer_stepped():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), LossScaler()
    fill(weight, True)
    assert scaler.step(optimizer) is False and weight.tolist() == [1.0, 1.0]
    scaler.update()
    fill(weight, False)
    assert scaler.step(optimizer) is True


def test_resume_continues_the_trajectory():
    overflows = [False, False, True, False, False, False, True, False]
    rule = ScaleRule(growth_interval=2)

    def run(scaler, events):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        for overflow in events:
            fill(weight, overflow)
            scaler.step(optimizer)
            scaler.update()
        return scaler

    whole = run(LossScaler(rule=rule), overflows)
    first, second = run(LossScaler(rule=rule), overflows[:3]), LossScaler(rule=rule)
    second.load_state_dict(first.state_dict())
    assert run(second, overflows[3:]).state == whole.state


def test_hysteresis_forgives_overflows_until_the_scale_grows():
    rule = ScaleRule(hysteresis=2, growth_interval=3)
    state, scales = ScaleState(1024.0), []
    for overflowed in (True, True, True, False, False, False, True, True):
        state = next_scale(state, rule, overflowed=overflowed)
        scales.append(state.scale)
    assert scales == [1024, 512, 256, 256, 256, 512, 512, 256]


def test_a_static_scale_never_moves():
    state = ScaleState(128.0)
    for overflowed in [True, False] * 3000:
        state = next_scale(state, ScaleRule.static(), overflowed=overflowed)
    assert state.scale == 128.0


def test_unscale_finds_overflow_in_any_gradient():
    gradients = [torch.full((2,), 8.0), torch.tensor([1.0, torch.nan])]
    assert unscale_(gradients, 4.0) is True
    assert gradients[0].tolist() == [2.0, 2.0]
    assert unscale_([torch.ones(3, dtype=torch.bfloat16)], 2.0) is False


def test_rejects_float16_gradients():
    with pytest.raises(TypeError, match="expected float32, got float16"):
        unscale_([torch.ones(2, dtype=torch.float16)], 2.0)


def test_rejects_calls_out_of_order():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), LossScaler()
    with pytest.raises(ValueError, match="expected gradients to unscale"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="got neither"):
        scaler.update()
    fill(weight, False)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="second call"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="second step"):
        scaler.step(optimizer)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_rejects_scales(scale):
    with pytest.raises(ValueError, match="init_scale"):
        LossScaler(init_scale=scale)


@pytest.mark.parametrize(
    "change",
    [
        {"growth_factor": 0.5},
        {"backoff_factor": 1.5},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"hysteresis": 0},
    ],
)
def test_rejects_rules(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ScaleRule(**change)


def test_rejects_a_foreign_state():
    with pytest.raises(ValueError, match="expected the keys"):
        LossScaler().load_state_dict({"scale": 1.0, "_growth_tracker": 3})


def test_invariant_a_run_of_overflows_ends_at_the_floor():
    """Where the loss is NaN the scale falls at each step; it must not become zero, and divide."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = LossScaler()
    for _ in range(1200):
        weight.grad = torch.full_like(weight, torch.nan)
        assert not scaler.step(optimizer)
        scaler.update()
    assert scaler.state.scale == 2.0**-126
    weight.grad = torch.full_like(weight, 2.0**-126)  # and a good step is a good step
    assert scaler.step(optimizer) and weight.item() == -1.0
    rule = ScaleRule(min_scale=1.0)  # DeepSpeed's default
    state = ScaleState(4.0)
    for _ in range(5):
        state = next_scale(state, rule, overflowed=True)
    assert state.scale == 1.0
    assert next_scale(ScaleState(0.5), rule, overflowed=True).scale == 0.5  # never upwards
    with pytest.raises(ValueError, match="min_scale: expected at least"):
        ScaleRule(min_scale=0.0)
