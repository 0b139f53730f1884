"""A run of any module and optimizer, saved so that it goes on as if it had never stopped.

Weights alone do not resume a run: Adam's moments, its count of steps, learning rates in the groups
and the state of random generators belong to it as well. The file is whole or the one before, and
loading changes everything or nothing.

`Trainer` has its own format, of safetensors; several ranks with whole models use `save_replica`,
sharded ones `save_sharded`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference.configuration import replacing


def save_run(
    path: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    generators: Sequence[torch.Generator] = (),
) -> None:
    """Write the state after `step` steps: module, optimizer, torch's own generator and others.

    Raises: OSError where the file cannot be written; the old one stays then.
    """
    random = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    state = {
        "module": module.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "random": random,
    }
    with replacing(Path(path)) as unfinished:
        torch.save(state, unfinished)


def load_run(
    path: Path | str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    generators: Sequence[torch.Generator] = (),
    device: torch.device | str | None = None,
) -> int:
    """Go on where `save_run` left off; the number of steps done.

    Nothing in the file is executed (`weights_only`). `device` is where the optimizer's states
    belong, by default where they were.

    Raises: FileNotFoundError; ValueError for a file that is cut or foreign, or of another module,
    another optimizer or other generators: nothing has changed then.
    """
    state = _read(Path(path), device)
    _check_module(path, state["module"], module)
    if optimizer is not None:
        _check_groups(path, state["optimizer"], optimizer)
    own, *others = state["random"]
    if len(others) != len(generators):
        raise ValueError(f"{path}: expected {len(others)} generators, got {len(generators)}")
    module.load_state_dict(state["module"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    for generator, saved in zip(generators, others, strict=True):
        generator.set_state(saved.cpu())
    torch.set_rng_state(own.cpu())
    return int(state["step"])


def _read(path: Path, device: torch.device | str | None) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected a file of save_run, it is cut or foreign") from error
    if not isinstance(state, dict) or state.keys() != {"module", "optimizer", "step", "random"}:
        raise ValueError(f"{path}: expected a file of save_run, got another's")
    return state


def _check_module(path: Path | str, saved: Mapping[str, Any], module: nn.Module) -> None:
    def shape(value: Any) -> Any:
        return value.shape if isinstance(value, Tensor) else None

    ours = module.state_dict()
    names = {*saved, *ours}
    differing = [n for n in names if n not in saved or n not in ours]
    differing += [n for n in names - {*differing} if shape(saved[n]) != shape(ours[n])]
    if differing:
        raise ValueError(f"{path}: expected the tensors of this module, differs in "
                         f"{', '.join(sorted(differing)[:8])}")  # fmt: skip


def _check_groups(path: Path | str, saved: Any, optimizer: torch.optim.Optimizer) -> None:
    if saved is None:
        raise ValueError(f"{path}: expected an optimizer's state, the file has none")
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(f"{path}: expected groups of {ours} parameters, got {theirs}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        for name, value in state.items():
            is_like = not isinstance(value, Tensor) or value.ndim == 0
            if not is_like and value.numel() > 1 and value.shape != parameters[number].shape:
                raise ValueError(
                    f"{path}: expected {name} of parameter {number} like it, "
                    f"{tuple(parameters[number].shape)}, got {tuple(value.shape)}"
                )
