"""A run that is saved and goes on equals one that never stopped, bit for bit."""

import pytest
import torch
from torch import nn

from reference.transformer.optimizer import AdamW
from reference.transformer.resume import load_run, save_run


def build(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5),
                         nn.Linear(width, 2))  # fmt: skip


OPTIMIZERS = {
    "torch's AdamW": lambda m: torch.optim.AdamW(
        [{"params": [p for p in m.parameters() if p.ndim > 1]},
         {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=0.1,
    ),
    "ours": lambda m: AdamW(m.parameters(), lr=0.1),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
}  # fmt: skip


def steps(module, optimizer, generator, num):
    for _ in range(num):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=generator)
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bit_for_bit(name, tmp_path):
    whole, draws = build(), torch.Generator().manual_seed(1)
    optimizer = OPTIMIZERS[name](whole)
    steps(whole, optimizer, draws, 2)
    save_run(tmp_path / "run", whole, optimizer, step=2, generators=[draws])
    steps(whole, optimizer, draws, 3)

    module, others = build(), torch.Generator()
    again = OPTIMIZERS[name](module)
    torch.manual_seed(99)  # dropout's draws are restored
    assert load_run(tmp_path / "run", module, again, generators=[others]) == 2
    steps(module, again, others, 3)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(module.state_dict()[key], tensor), key
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_rejects_what_does_not_fit_and_changes_nothing(tmp_path):
    module = build()
    optimizer = OPTIMIZERS["ours"](module)
    steps(module, optimizer, torch.Generator().manual_seed(1), 1)
    path = tmp_path / "run"
    save_run(path, module, optimizer, step=1)
    wide = build(8)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    with pytest.raises(ValueError, match="the tensors of this module, differs in 0.bias, 0.weight"):
        load_run(path, wide)
    assert all(torch.equal(wide.state_dict()[name], tensor) for name, tensor in before.items())
    fresh = build()
    with pytest.raises(ValueError, match=r"expected groups of \[2, 4\] parameters, got \[6\]"):
        load_run(path, fresh, OPTIMIZERS["torch's AdamW"](fresh))
    with pytest.raises(ValueError, match="expected 0 generators, got 1"):
        load_run(path, fresh, generators=[torch.Generator()])
    assert torch.equal(fresh[0].weight, build()[0].weight)
    with pytest.raises(FileNotFoundError):
        load_run(tmp_path / "none", module)


def test_rejects_files_that_are_cut_foreign_or_without_an_optimizer(tmp_path):
    module, path = build(), tmp_path / "run"
    save_run(path, module)
    with pytest.raises(ValueError, match="expected an optimizer's state, the file has none"):
        load_run(path, module, OPTIMIZERS["ours"](module))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="it is cut or foreign"):
        load_run(path, module)
    torch.save({"model": module.state_dict()}, path)
    with pytest.raises(ValueError, match="expected a file of save_run, got another's"):
        load_run(path, module)


def test_a_failed_write_leaves_the_file_before(tmp_path):
    module, path = build(), tmp_path / "run"
    save_run(path, module, step=3)
    module.state_dict = lambda: {"lock": (i for i in ())}
    with pytest.raises((TypeError, AttributeError)):
        save_run(path, module, step=4)
    assert load_run(path, build()) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
