"""The oracle: torch's fully_shard and torch.distributed.checkpoint on two processes.

Four simulated ranks write what two processes of torch read, and the other way round. A width of 21
on 4 ranks leaves rows uneven, an output of width 1 leaves ranks without any.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from reference.parallel.ranks import run
from reference.parallel.zero import FSDP
from reference.parallel.zero.distributed_checkpoint import (
    load_blocks,
    load_distributed,
    save_blocks,
    save_distributed,
)


def fresh(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 21), nn.BatchNorm1d(21), nn.Linear(21, 1))


def train(model, optimizer, num_steps=2):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole_states(model, optimizer):
    """All that a checkpoint has, by torch's names, of a model on one rank."""
    found = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            found[f"optim.state.{name}.{kind}"] = value
    return {name: t.detach().clone() for name, t in found.items()}


def ours(comm, seed=0):
    fsdp = FSDP(fresh(seed), comm)
    return fsdp, torch.optim.AdamW(fsdp.parameters())


def gathered(fsdp, optimizer):
    """Our states, whole, by torch's names."""
    found = {f"model.{name}": t for name, t in fsdp.full_state_dict().items()}
    for name, parameter in fsdp.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            if value.shape == parameter.shape:
                rows = [len(c) for c in torch.empty(parameter.whole_shape).chunk(fsdp.comm.size)]
                padded = value.new_zeros(rows[0], *value.shape[1:])
                padded[: len(value)] = value
                value = fsdp.comm.all_gather(padded)[: parameter.whole_shape[0]]
            found[f"optim.state.{name}.{kind}"] = value
    return found


def theirs():
    """torch's own: the model, its optimizer, and the state dict that it saves and loads."""
    model = fully_shard(fresh(seed=2))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, num_steps=1)
    states = get_optimizer_state_dict(model, optimizer)
    return model, optimizer, {"model": get_model_state_dict(model), "optim": states}


def assert_equal(found, truth):
    assert found.keys() == truth.keys()
    for name in truth:
        assert torch.equal(found[name], truth[name]), name


def write_ours(comm, folder):
    fsdp, optimizer = ours(comm)
    train(fsdp, optimizer)
    save_distributed(folder, fsdp, optimizer)
    return gathered(fsdp, optimizer)


@pytest.mark.slow
def test_matches_torch_that_reads_on_two_ranks_what_four_have_written(tmp_path):
    truth = run(4, write_ours, tmp_path / "saved").results[0]

    def read(comm):
        model, optimizer, state = theirs()
        groups = state["optim"].pop("param_groups")
        dcp.load(state, checkpoint_id=tmp_path / "saved")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(
            model, optimizer, {"state": state["optim"]["state"], "param_groups": groups}
        )
        found = whole_states(model, optimizer)
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}

    for found in run(2, read, backend="processes", is_measured=False).results:
        assert_equal(found, truth)
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "one.pt")
    assert_equal(torch.load(tmp_path / "one.pt"), truth)


@pytest.mark.slow
def test_matches_torch_that_has_written_on_two_ranks(tmp_path):
    def write(comm):
        model, optimizer, state = theirs()
        dcp.save(state, checkpoint_id=tmp_path / "saved")
        found = whole_states(model, optimizer)
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}

    def read(comm):
        fsdp, optimizer = ours(comm, seed=5)
        load_distributed(tmp_path / "saved", fsdp, optimizer)
        return gathered(fsdp, optimizer)

    truth = run(2, write, backend="processes", is_measured=False).results[0]
    for found in run(4, read).results:
        assert_equal(found, truth)


@pytest.mark.parametrize("backend", ["simulated", "processes"])
@pytest.mark.parametrize("before, after", [(3, 1), (1, 4), (2, 3)])
def test_invariant_any_number_of_ranks_reads(tmp_path, before, after, backend):
    def read(comm):
        fsdp, optimizer = ours(comm, seed=5)
        load_distributed(tmp_path / "saved", fsdp, optimizer)
        return gathered(fsdp, optimizer)

    options = {"backend": backend, "is_measured": False}
    for _ in range(2):  # the second one replaces the first
        truth = run(before, write_ours, tmp_path / "saved", **options).results[0]
    assert_equal(run(after, read, **options).results[0], truth)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_rejects_what_a_checkpoint_does_not_have(tmp_path):
    def program(comm):
        fsdp, optimizer = ours(comm)
        with pytest.raises(FileNotFoundError, match="load_sharded reads those of save_sharded"):
            load_distributed(tmp_path / "none", fsdp)
        save_distributed(tmp_path / "saved", fsdp)
        with pytest.raises(ValueError, match="expected optimizer states"):
            load_distributed(tmp_path / "saved", fsdp, optimizer)
        with pytest.raises(ValueError, match=r"x: expected shape \(4,\) in .*nothing of that name"):
            load_blocks(tmp_path / "saved", {"x": (torch.zeros(2), (4,))}, comm)
        wrong = {"model.0.bias": (torch.zeros(11, 1), (22, 1))}
        with pytest.raises(ValueError, match=r"expected shape \(22, 1\) in .*found shape \(21,\)"):
            load_blocks(tmp_path / "saved", wrong, comm)
        with pytest.raises(ValueError, match=r"x: expected shape \(2,\), this rank's rows of"):
            save_blocks(tmp_path / "other", {"x": (torch.zeros(3), (4,))}, comm)

    run(2, program)
