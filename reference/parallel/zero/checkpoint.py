"""Sharded checkpoints: each rank writes its part, and any number of ranks reads them.

A run on 8 ranks stops, and 6 come back. Parts are cut at other places now, but the vector of a unit
is the same; so a rank that needs elements [a, b) reads them from whichever files have them, and
reads no more.

    model.json                        units, names, shapes, world size
    rank-00000-of-00008.safetensors   "layers.0/parameter", "layers.0/exp_avg", ... each (n,)

Everything is written beside its place and moved there at the end, so that a run that dies while
saving leaves the last whole checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference.parallel.zero.flat import FlatLayout
from reference.parallel.zero.fsdp import FSDP
from reference.parallel.zero.unit import Unit

INDEX = "model.json"


def save_sharded(
    folder: str | Path, model: FSDP, optimizer: torch.optim.Optimizer | None = None, *,
    step: int = 0,
) -> None:  # fmt: skip
    """Write this rank's parts of parameters and optimizer states; collective.

    With hybrid sharding one of the replicas writes. An existing checkpoint is replaced when all
    ranks have written.

    Raises: OSError where the folder cannot be written.
    """
    comm, folder = model.comm, Path(folder)
    writing = folder.with_name(f"{folder.name}.writing")
    is_writer = model.replicas is None or model.replicas.rank == 0
    if is_writer:
        if comm.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        comm.barrier()
        tensors = {}
        for unit in model.units:
            for name, part in _parts(unit, optimizer).items():
                tensors[f"{unit.name}/{name}"] = part.detach().contiguous()
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
    """Fill this rank's parts from a checkpoint of any world size; the step at which it was saved.

    Raises: FileNotFoundError for a folder or a rank's file that is missing; ValueError where the
    checkpoint is of another model or other units, or has no optimizer states that are asked for.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder / INDEX}: expected a checkpoint by save_sharded")
    index = json.loads((folder / INDEX).read_text())
    _check_index(index, model)
    files = [folder / _file(rank, index["world_size"]) for rank in range(index["world_size"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: expected {len(files)} parts, missing {missing}")
    opened = [safe_open(file, framework="pt") for file in files]
    for unit in model.units:
        saved_numel = _saved_layout(unit, index["world_size"]).shard_numel
        states = [k.split("/")[1] for k in opened[0].keys() if k.split("/")[0] == unit.name]
        loaded = {name: _read(opened, f"{unit.name}/{name}", unit, saved_numel) for name in states}
        with torch.no_grad():
            unit.shard.copy_(loaded.pop("parameter"))
        if optimizer is not None:
            _fill(optimizer, unit.shard, loaded)
    return int(index["step"])


def _parts(unit: Unit, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    state = optimizer.state.get(unit.shard, {}) if optimizer else {}
    return {"parameter": unit.shard, **state}


def _file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05}-of-{world_size:05}.safetensors"


def _index(model: FSDP, step: int) -> dict[str, Any]:
    units = {
        unit.name: dict(zip(unit.layout.names, map(list, unit.layout.shapes), strict=True))
        for unit in model.units
    }
    return {"world_size": model.comm.size, "step": step, "units": units}


def _check_index(index: dict[str, Any], model: FSDP) -> None:
    ours = _index(model, 0)["units"]
    if index["units"] != ours:
        differing = sorted(
            name
            for name in {**index["units"], **ours}
            if index["units"].get(name) != ours.get(name)
        )
        raise ValueError(f"checkpoint: expected the units of this model, differs in {differing}")


def _saved_layout(unit: Unit, world_size: int) -> FlatLayout:
    return FlatLayout(unit.layout.names, unit.layout.shapes, world_size)


def _read(opened: list[Any], key: str, unit: Unit, saved_numel: int) -> Tensor:
    """Elements of this rank's part, from the files that have them; padding is zero."""
    if not opened[0].get_slice(key).get_shape():
        return opened[0].get_tensor(key)  # Adam's count of steps, the same on each rank
    numel = unit.layout.shard_numel
    start = unit.comm.rank * numel
    end = min(start + numel, unit.layout.numel)
    pieces = []
    for rank in range(start // saved_numel, -(-end // saved_numel)):
        offset = rank * saved_numel
        low, high = max(start - offset, 0), min(end - offset, saved_numel)
        pieces.append(opened[rank].get_slice(key)[low:high])
    part = torch.cat([*pieces, torch.zeros(0)])
    return nn.functional.pad(part, (0, numel - part.numel()))


def _fill(optimizer: torch.optim.Optimizer, shard: nn.Parameter, state: dict[str, Tensor]) -> None:
    if not state:
        raise ValueError("checkpoint: expected optimizer states, found parameters alone")
    optimizer.state[shard] = state
