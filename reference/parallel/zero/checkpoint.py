"""Sharded checkpoints: each rank writes its rows, and any number of ranks reads them.

A run on 8 ranks stops, and 6 come back. Parameters are cut at other rows now, but their rows are
the same; so a rank that needs rows [a, b) reads them from whichever files have them, and reads no
more.

    model.json                        names, shapes and dtypes; world size, step
    rank-00000-of-00008.safetensors   "layers.0.wq/parameter", "layers.0.wq/exp_avg", ...: its rows

Buffers are in the first file. Everything is written beside its place and moved there at the end, so
that a run that dies while saving leaves the last whole checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference.parallel.ranks import Comm
from reference.parallel.zero.fsdp import FSDP
from reference.parallel.zero.ownership import Held
from reference.parallel.zero.rows import rows_of

INDEX = "model.json"


def save_sharded(
    folder: str | Path, model: FSDP, optimizer: torch.optim.Optimizer | None = None, *,
    step: int = 0,
) -> None:  # fmt: skip
    """Write this rank's rows of parameters and optimizer states, and the buffers; collective.

    With hybrid sharding one of the replicas writes. An existing checkpoint is replaced when all
    ranks have written.

    Raises: TypeError for another model than an FSDP; OSError where the folder cannot be written;
    ValueError for an optimizer's state that is neither as large as its parameter nor a number.
    """
    _check_sharded(model)
    comm, folder = model.comm, Path(folder)
    writing = folder.with_name(f"{folder.name}.writing")
    tensors = _tensors(model, optimizer)
    is_writer = model.replicas is None or model.replicas.rank == 0
    if is_writer:
        if comm.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        comm.barrier()
        save_file(tensors, writing / _file(comm.rank, comm.size))
        comm.barrier()
        if comm.rank == 0:
            (writing / INDEX).write_text(json.dumps(_index(model, step), indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            writing.rename(folder)
    if model.replicas is not None:
        model.replicas.barrier()
    comm.barrier()


def load_sharded(
    folder: str | Path, model: FSDP, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Fill this rank's shards from a checkpoint of any world size; the step at which it was saved.

    Raises: TypeError for another model than an FSDP; FileNotFoundError for a folder or a rank's
    file that is missing; ValueError where the checkpoint is of another model, or has no optimizer
    states that are asked for.
    """
    _check_sharded(model)
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder / INDEX}: expected a checkpoint by save_sharded")
    index = json.loads((folder / INDEX).read_text())
    _check_index(index, model)
    files = [folder / _file(rank, index["world_size"]) for rank in range(index["world_size"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: expected {len(files)} parts, missing {missing}")
    saved = _Saved([safe_open(file, framework="pt") for file in files])
    if optimizer is not None and not saved.has_states:
        raise ValueError("checkpoint: expected optimizer states, found parameters alone")
    with torch.no_grad():
        for held in _held(model):
            held.parameter.copy_(saved.rows(held, "parameter", model.comm))
            states = {kind: saved.rows(held, kind, model.comm) for kind in saved.states(held.name)}
            if optimizer is not None and states:
                optimizer.state[held.parameter] = states
        for name, buffer in _buffers(model).items():
            buffer.copy_(saved.opened[0].get_tensor(f"{name}/buffer"))
    return int(index["step"])


class _Saved:
    """The opened files of a checkpoint, in rank order."""

    def __init__(self, opened: list[Any]) -> None:
        self.opened = opened
        self._kinds: dict[str, list[str]] = {}
        for key in opened[0].keys():
            name, _, kind = key.rpartition("/")
            self._kinds.setdefault(name, []).append(kind)

    @property
    def has_states(self) -> bool:
        return any(set(kinds) - {"parameter", "buffer"} for kinds in self._kinds.values())

    def states(self, name: str) -> list[str]:
        """Which optimizer states there are of a parameter."""
        return [kind for kind in self._kinds[name] if kind not in ("parameter", "buffer")]

    def rows(self, held: Held, kind: str, comm: Comm) -> Any:
        """This rank's rows, from the files that have them."""
        key, total = f"{held.name}/{kind}", held.shape[0]
        if not self.opened[0].get_slice(key).get_shape():
            number = self.opened[0].get_tensor(key)  # Adam's count of steps, the same on each rank
            return number if number.is_floating_point() else number.item()
        wanted = rows_of(total, comm.size, comm.rank)
        pieces = []
        for rank, file in enumerate(self.opened):
            there = rows_of(total, len(self.opened), rank)
            low, high = max(wanted.start, there.start), min(wanted.stop, there.stop)
            if low < high:
                pieces.append(file.get_slice(key)[low - there.start : high - there.start])
        return torch.cat(pieces) if pieces else self.opened[0].get_slice(key)[:0]


def _check_sharded(model: Any) -> None:
    if not isinstance(model, FSDP):
        raise TypeError(
            f"model: expected an FSDP, got {type(model).__name__}; ranks that hold whole models "
            "use save_replica"
        )


def _held(model: FSDP) -> list[Held]:
    return [held for unit in model.units for held in unit.held]


def _buffers(model: FSDP) -> dict[str, Tensor]:
    """Those that belong to the state: not the tables that can be made again."""
    shards = {id(held.parameter) for held in _held(model)}
    state = model.module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if id(tensor) not in shards}


def _tensors(model: FSDP, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All that this rank writes, by its name in the file."""
    found = {}
    for held in _held(model):
        found[f"{held.name}/parameter"] = held.parameter.detach().contiguous()
        states = optimizer.state.get(held.parameter, {}) if optimizer else {}
        for kind, value in states.items():
            state = torch.as_tensor(value)
            if state.ndim and state.shape != held.parameter.shape:
                raise ValueError(
                    f"optimizer: expected states like {held.name}, {tuple(held.parameter.shape)}, "
                    f"or numbers; {kind} has the shape {tuple(state.shape)}"
                )
            found[f"{held.name}/{kind}"] = state.contiguous()
    if model.comm.rank == 0:
        found |= {f"{name}/buffer": b.contiguous() for name, b in _buffers(model).items()}
    return found


def _file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05}-of-{world_size:05}.safetensors"


def _index(model: FSDP, step: int) -> dict[str, Any]:
    parameters = {held.name: [list(held.shape), str(held.parameter.dtype)] for held in _held(model)}
    return {"world_size": model.comm.size, "step": step, "parameters": parameters}


def _check_index(index: dict[str, Any], model: FSDP) -> None:
    saved, ours = index["parameters"], _index(model, 0)["parameters"]
    if saved != ours:
        names = sorted(n for n in {**saved, **ours} if saved.get(n) != ours.get(n))
        raise ValueError(f"checkpoint: expected the parameters of this model, differs in {names}")
