"""Checkpoints in the format of torch.distributed.checkpoint, which other systems read and write.

A shard is a block of a whole tensor: its first row and its size. Where a checkpoint lists blocks, a
reader of any number of ranks can take from each what overlaps with its own:

    .metadata        names, whole shapes, blocks, and where in which file each block lies
    __2_0.distcp     the blocks that rank 2 has written

torch.distributed.checkpoint asks all ranks what they will write. Here everybody knows: rows are cut
as `fully_shard` cuts them (rows.py). So no process group is needed, and simulated ranks can write
too. Names are those of torch's own state dicts: "model.layers.0.attention.wq.weight",
"optim.state.layers.0.attention.wq.weight.exp_avg".

Source: torch.distributed.checkpoint, whose file formats and planners these are.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from reference.parallel.ranks import Comm
from reference.parallel.zero.fsdp import FSDP
from reference.parallel.zero.rows import rows_of

Shards = Mapping[str, tuple[Tensor, Sequence[int] | None]]


def save_blocks(folder: str | Path, shards: Shards, comm: Comm) -> None:
    """Write this rank's rows of named tensors; collective, with the same names on all ranks.

    `shards` has (this rank's rows, shape of the whole), or (tensor, None) for what all ranks hold
    alike and rank 0 writes. An existing checkpoint is replaced when all ranks have written.

    Raises: ValueError for rows that are not this rank's; OSError where nothing can be written.
    """
    _check_rows(shards, comm)
    folder = Path(folder)
    writing = folder.with_name(f"{folder.name}.writing")
    if comm.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    comm.barrier()
    writer = FileSystemWriter(writing)
    writer.set_up_storage_writer(comm.rank == 0)
    plans, metadata = create_default_global_save_plan(
        [SavePlan(_items(shards, comm.size, rank)) for rank in range(comm.size)]
    )
    plan = writer.prepare_global_plan(plans)[comm.rank]
    written = writer.write_data(plan, _Saving(shards)).wait()
    (writing / f"{comm.rank}.written").write_bytes(pickle.dumps(written))
    comm.barrier()
    if comm.rank == 0:
        places = [writing / f"{rank}.written" for rank in range(comm.size)]
        flat = {name: (name,) for name in shards}
        writer.finish(
            replace(metadata, planner_data=flat), [pickle.loads(p.read_bytes()) for p in places]
        )
        for place in places:
            place.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
    comm.barrier()


def load_blocks(folder: str | Path, shards: Shards, comm: Comm) -> None:
    """Fill this rank's rows of named tensors, from a checkpoint that any number of ranks has
    written, by `save_blocks` or by torch; what else it has is not read.

    Raises: FileNotFoundError where there is no checkpoint; ValueError for a name or a shape that it
    does not have, or rows that are not this rank's.
    """
    _check_rows(shards, comm)
    saved = _metadata(folder)
    items = []
    for name, (tensor, shape) in shards.items():
        stored = saved.state_dict_metadata.get(name)
        size = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
        whole = tuple(tensor.shape if shape is None else shape)
        if size != whole:
            found = "nothing of that name" if size is None else f"shape {size}"
            raise ValueError(f"{name}: expected shape {whole} in {folder}, found {found}")
        chunk = _chunk(tensor.shape, shape, comm.size, comm.rank)
        if tensor.numel():
            items += create_read_items_for_chunk_list(name, stored, [chunk])  # type: ignore[arg-type]
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(saved, comm.rank == 0)
    with torch.no_grad():
        reader.read_data(LoadPlan(items), _Loading(shards)).wait()
    comm.barrier()


def save_distributed(
    folder: str | Path, model: FSDP, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """`save_blocks` of parameters, buffers and optimizer states; collective.

    With hybrid sharding the first replica writes.
    """
    if model.replicas is None or model.replicas.rank == 0:
        save_blocks(folder, {**_model_shards(model), **_states(model, optimizer)}, model.comm)
    if model.replicas is not None:
        model.replicas.barrier()


def load_distributed(
    folder: str | Path, model: FSDP, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """`load_blocks` into parameters, buffers and optimizer states, which are made where needed.

    Raises: as `load_blocks`; ValueError where optimizer states are asked for that are not there.
    """
    shards = _model_shards(model)
    if optimizer is not None:
        _make_states(_metadata(folder), model, optimizer)
        shards |= _states(model, optimizer)
    load_blocks(folder, shards, model.comm)


class _Saving(DefaultSavePlanner):
    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self._shards = shards

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._shards[write_item.index.fqn][0].detach().contiguous()


class _Loading(DefaultLoadPlanner):
    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self._shards = shards

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._shards[index.fqn][0].detach()


def _metadata(folder: str | Path) -> Metadata:
    if not (Path(folder) / ".metadata").is_file():
        raise FileNotFoundError(
            f"{folder}: expected a checkpoint by torch.distributed.checkpoint or save_distributed; "
            "load_sharded reads those of save_sharded"
        )
    return FileSystemReader(folder).read_metadata()


def _check_rows(shards: Shards, comm: Comm) -> None:
    for name, (tensor, shape) in shards.items():
        if shape is not None:
            expected = tuple(_chunk(tensor.shape, shape, comm.size, comm.rank).sizes)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{name}: expected shape {expected}, this rank's rows of {tuple(shape)}, got "
                    f"{tuple(tensor.shape)}"
                )


def _chunk(
    local: Sequence[int], shape: Sequence[int] | None, world_size: int, rank: int
) -> ChunkStorageMetadata:
    if shape is None:
        return ChunkStorageMetadata(torch.Size([0] * len(local)), torch.Size(local))
    rows = rows_of(shape[0], world_size, rank)
    offsets = [rows.start, *[0] * (len(shape) - 1)]
    return ChunkStorageMetadata(
        torch.Size(offsets), torch.Size([rows.stop - rows.start, *shape[1:]])
    )


def _items(shards: Shards, world_size: int, rank: int) -> list[WriteItem]:
    """What a rank writes: its blocks, where they have rows."""
    items = []
    for name, (tensor, shape) in shards.items():
        chunk = _chunk(tensor.shape, shape, world_size, rank)
        if 0 in chunk.sizes or (shape is None and rank > 0):
            continue
        whole = torch.Size(tensor.shape if shape is None else shape)
        kind = WriteItemType.TENSOR if shape is None else WriteItemType.SHARD
        data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), whole)
        items.append(WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=data))
    return items


def _model_shards(model: FSDP) -> dict[str, tuple[Tensor, Sequence[int] | None]]:
    state = model.module.state_dict(keep_vars=True)
    return {f"model.{name}": (t, getattr(t, "whole_shape", None)) for name, t in state.items()}


def _states(
    model: FSDP, optimizer: torch.optim.Optimizer | None
) -> dict[str, tuple[Tensor, Sequence[int] | None]]:
    found: dict[str, tuple[Tensor, Sequence[int] | None]] = {}
    for name, parameter in model.named_parameters():
        states = optimizer.state.get(parameter, {}) if optimizer else {}
        for kind, value in states.items():
            is_sharded = value.shape == parameter.shape
            whole = _whole_shape(parameter) if is_sharded else None
            found[f"optim.state.{name}.{kind}"] = value, whole
    return found


def _whole_shape(parameter: Tensor) -> torch.Size:
    return parameter.whole_shape  # type: ignore[attr-defined]


def _make_states(saved: Metadata, model: FSDP, optimizer: torch.optim.Optimizer) -> None:
    """Empty states of the kinds that the checkpoint has, to be filled."""
    names = saved.state_dict_metadata
    if not any(name.startswith("optim.state.") for name in names):
        raise ValueError("checkpoint: expected optimizer states, found parameters alone")
    for name, parameter in model.named_parameters():
        prefix = f"optim.state.{name}."
        state: dict[str, Any] = {}
        for key, stored in names.items():
            kind = key.removeprefix(prefix)
            if kind == key or "." in kind or not isinstance(stored, TensorStorageMetadata):
                continue
            is_sharded = stored.size == _whole_shape(parameter)
            shape, device = (
                (parameter.shape, parameter.device) if is_sharded else (stored.size, None)
            )
            state[kind] = torch.zeros(shape, dtype=stored.properties.dtype, device=device)
        if state:
            optimizer.state[parameter] = state
