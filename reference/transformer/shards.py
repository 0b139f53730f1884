"""The files of a checkpoint: which tensor is in which, in one `model.safetensors` or in many.

    model.safetensors.index.json        {"weight_map": {tensor: file, ...}}
    model-00001-of-00003.safetensors    ...

An index of an earlier save beside the files of a later one names tensors that are elsewhere, or
names no files at all that are there; some readers follow it, others do not.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference.configuration import NOTHING, Keys, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
INDEX_KEYS = Keys(file=INDEX, honoured={"weight_map": (dict,), "metadata": (dict, *NOTHING)})
STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def split(tensors: Mapping[str, Tensor], max_bytes: int) -> dict[str, dict[str, Tensor]]:
    """What goes into which file: one shard is filled after the other, in order."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def read_tensors(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a folder with its name.

    Raises: FileNotFoundError for missing files; ValueError for broken ones, an index of another
    save, and quantised tensors.
    """
    for path, names in _weight_files(folder).items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX} names it; fetch it again")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                found = set(file.keys())
                if names is not None and found != names:
                    differing = ", ".join(sorted(found ^ names)[:3])
                    raise ValueError(
                        f"{folder / INDEX}: expected what {path.name} has, differs in {differing}; "
                        "the index is of another save: fetch both again"
                    )
                for name in found:
                    yield name, _floating(path, name, file.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); fetch it again"
            ) from error


def _floating(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in STORED:
        raise ValueError(
            f"{path}: {name}: expected a floating point dtype, got {tensor.dtype}; quantised "
            "weights must be widened first"
        )
    return tensor


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a folder, and which tensors the index expects in each."""
    has_index, has_whole = ((folder / name).is_file() for name in (INDEX, WEIGHTS))
    if has_index and has_whole:
        raise ValueError(
            f"{folder}: expected {WEIGHTS} or {INDEX}, got both, of which readers take one or the "
            "other; delete that of the older save"
        )
    if has_index:
        where = INDEX_KEYS.read(read_json(folder / INDEX)).get("weight_map")
        if where is None:
            raise ValueError(f"{folder / INDEX}: expected a 'weight_map'; fetch it again")
        files: dict[Path, set[str] | None] = {}
        for file in sorted({str(file) for file in where.values()}):
            if Path(file).name != file:
                raise ValueError(f"{folder / INDEX}: expected names of files here, got {file!r}")
            files[folder / file] = {name for name, place in where.items() if place == file}
        return files
    if not has_whole:
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; a pytorch_model.bin must be converted "
            "first (transformers: model.save_pretrained)"
        )
    return {folder / WEIGHTS: None}


def remove_older(folder: Path, keep: list[str]) -> None:
    """Weights of an earlier save under other names would be read instead of the new ones."""
    for path in folder.iterdir():
        if path.name not in keep and (path.name in (WEIGHTS, INDEX) or SHARD.fullmatch(path.name)):
            path.unlink()
