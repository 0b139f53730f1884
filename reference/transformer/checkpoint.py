"""Checkpoints in Hugging Face's form: config.json beside safetensors, in one file or many.

The model's parameters have the names of the files but for the prefix `model.`, so that reading is
a check and a copy: every tensor there, none besides, each of its shape. Then transformers loads
what this writes, and this loads what transformers writes.

    config.json                         the shape, by transformers' names
    model.safetensors                   all tensors, or
    model.safetensors.index.json        which tensor is in which of
    model-00001-of-00003.safetensors    ...

A tied head is not stored. Older checkpoints store it, and RoPE's frequencies too: the one is
compared, the others are left out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference.transformer.config import LlamaConfig
from reference.transformer.huggingface import from_huggingface, to_huggingface
from reference.transformer.model import Llama

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_pretrained(
    model: Llama,
    folder: Path | str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the tensors, in files of at most `max_shard_bytes` (a tensor is whole).

    `entries` are added to config.json: `{"eos_token_id": 2}`. Each file is written beside its place
    and moved there, so that a crash leaves the old one, and a model that was loaded from `folder`
    can be saved to it.

    Raises: ValueError for a shard size below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_stored_name(name): t.contiguous() for name, t in model.state_dict().items()}
    shards = list(_shards(tensors, max_shard_bytes))
    names = [WEIGHTS]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        with _replacing(folder / name) as path:
            save_file(shard, path, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        size = sum(t.nbytes for t in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        names.append(INDEX)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {**to_huggingface(model.config), "dtype": dtype, **(entries or {})}
    _write_json(folder / CONFIG, config)
    _remove_older(folder, names)


def load_pretrained(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """The model of a folder, in evaluation mode; in the files' dtype unless `dtype` says otherwise.

    Raises: FileNotFoundError where a file is missing; ValueError for a file that is cut off, for a
    model that is not a Llama, for tensors that are missing, extra or of another shape, and for a
    tied head that differs from the embedding.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    expected = {_stored_name(name): t.shape for name, t in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    stored_head = None
    for name, tensor in _tensors(folder, str(device)):
        if name == HEAD and config.is_tied:
            stored_head = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            state[name] = tensor
    _check_names(folder, expected, state)
    if stored_head is not None and not torch.equal(stored_head, state[EMBEDDING]):
        raise ValueError(
            f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
            'set "tie_word_embeddings": false there'
        )
    model.load_state_dict(
        {name.removeprefix("model."): t.to(dtype=dtype) for name, t in state.items()}, assign=True
    )
    return model.eval()


def load_config(folder: Path | str) -> LlamaConfig:
    """The configuration of a folder.

    Raises: FileNotFoundError without a config.json, ValueError for one that is not a Llama's.
    """
    return from_huggingface(_read_json(Path(folder) / CONFIG))


def _stored_name(name: str) -> str:
    return name if name == HEAD else f"model.{name}"


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Fill one shard after the other, in order."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _tensors(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a folder with its name."""
    for path in _weight_files(folder):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX} names it; fetch it again")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118 (it is not a dict)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); fetch it again"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX}: expected a 'weight_map'; fetch it again")
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; a pytorch_model.bin must be converted "
            "first (transformers: model.save_pretrained)"
        )
    return [folder / WEIGHTS]


def _check_names(
    folder: Path, expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]
) -> None:
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{name}: expected {tuple(shape)}, got {tuple(state[name].shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(
            f"{folder}: the tensors do not fit config.json ({'; '.join(found)}); "
            "are both of the same model?"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, that takes the place of `path` once the writing has succeeded."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_older(folder: Path, keep: list[str]) -> None:
    """Weights of an earlier save under other names would be read instead of the new ones."""
    for path in folder.iterdir():
        if path.name not in keep and (path.name in (WEIGHTS, INDEX) or SHARD.fullmatch(path.name)):
            path.unlink()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a checkpoint is a folder with {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
