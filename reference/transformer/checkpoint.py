"""Checkpoints in Hugging Face's form: config.json beside safetensors, in one file or many.

The model's parameters have the names of the files but for the prefix `model.`, so that reading is
a check and a copy: every tensor there, none besides, each of its shape. Then transformers loads
what this writes, and this loads what transformers writes.

    config.json                         the shape, by transformers' names
    model.safetensors                   all tensors, or
    model.safetensors.index.json        which tensor is in which of
    model-00001-of-00003.safetensors    ...

A tied head is not stored. Older checkpoints store it, and RoPE's frequencies too: the one is
compared, the others are left out. An index says what each file has; where it says otherwise than
the files, it is of another save, and refused.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference.configuration import read_json, replacing, write_json
from reference.transformer.config import LlamaConfig
from reference.transformer.huggingface import from_huggingface, to_huggingface
from reference.transformer.model import Llama
from reference.transformer.shards import INDEX, read_tensors, remove_older, split

CONFIG = "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_pretrained(
    model: Llama,
    folder: Path | str,
    *,
    max_shard_bytes: int = 5 * 10**9,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the tensors, in files of at most `max_shard_bytes` (a tensor is whole).

    `entries` are added to config.json: `{"eos_token_id": 2}`. All files are written beside their
    places and moved there at the end, so that a failure leaves the old ones, and a model that was
    loaded from `folder` can be saved to it. A head that is the embedding itself is written as tied.

    Raises: ValueError for a shard size below 1, entries that would change the model, a model that
    carries adapters or a part of its tensors, or tensors that share memory otherwise.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    tensors, config = _stored(model)
    content = _config_content(config, model.embed_tokens.weight.dtype, entries or {})
    files = split(tensors, max_shard_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, shard in files.items():
            save_file(shard, stack.enter_context(replacing(folder / name)), {"format": "pt"})
        if len(files) > 1:
            where = {t: name for name, shard in files.items() for t in shard}
            size = sum(t.nbytes for t in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": where}
            write_json(stack.enter_context(replacing(folder / INDEX)), index)
        write_json(stack.enter_context(replacing(folder / CONFIG)), content)
    remove_older(folder, [*files, INDEX] if len(files) > 1 else list(files))


def load_pretrained(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """The model of a folder, in evaluation mode; in the files' dtype unless `dtype` says otherwise.

    Raises: FileNotFoundError where a file is missing; ValueError for a file that is cut off, for a
    model that is not a Llama or has a key that is not known, for tensors that are missing, extra,
    of another shape or quantised, for an index of another save, and for a tied head that differs
    from the embedding.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    state: dict[str, Tensor] = {}
    stored_head = None
    for name, tensor in read_tensors(folder, str(device)):
        if name == HEAD and config.is_tied:
            stored_head = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            state[name] = tensor
    if stored_head is not None:  # some tools store a shared tensor under one of its names
        state.setdefault(EMBEDDING, stored_head)
    _check_names(str(folder), _expected(config), state)
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
    return from_huggingface(read_json(Path(folder) / CONFIG))


def _stored_name(name: str) -> str:
    return name if name == HEAD else f"model.{name}"


def _expected(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = Llama(config).state_dict()
    return {_stored_name(name): t.shape for name, t in state.items()}


def _stored(model: Llama) -> tuple[dict[str, Tensor], LlamaConfig]:
    """The tensors under their names in files, each once, and the configuration that fits them."""
    tensors = {_stored_name(name): t.contiguous() for name, t in model.state_dict().items()}
    config = model.config
    if HEAD in tensors and _is_same(tensors[HEAD], tensors[EMBEDDING]):
        del tensors[HEAD]
        config = replace(config, is_tied=True)
    _check_names("model", _expected(config), tensors)
    places: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = places.setdefault(tensor.data_ptr() or id(tensor), name)
        if other != name:
            raise ValueError(
                f"{name}: expected memory of its own, got that of {other}; a file would untie "
                "them: clone one of the two first"
            )
    return tensors, config


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape


def _config_content(
    config: LlamaConfig, dtype: torch.dtype, entries: Mapping[str, Any]
) -> dict[str, Any]:
    plain = to_huggingface(config)
    content = {**plain, "dtype": str(dtype).removeprefix("torch."), **entries}
    if from_huggingface(content) != from_huggingface(plain):
        raise ValueError(
            f"entries: expected none that describe another model, got {dict(entries)}; change the "
            "model's config instead"
        )
    return content


def _check_names(
    where: str, expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]
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
            f"{where}: the tensors do not fit its config ({'; '.join(found)}); "
            "are both of the same model, whole and without adapters?"
        )
