"""Adapters as peft stores them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      (r, D)
                                                     lora_B.weight      (F, r)

`base_model.model.` is peft's wrapper, the next `model.` transformers' own; our Llama's names begin
after it. A model of transformers, whose names have it, is taken as well. Of adapter_config.json
every key is honoured, harmless or refused (`reference.configuration`): most of peft's would make
another function of the same two tensors, or of another base.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.configuration import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Keys,
    read_json,
    replacing,
    write_json,
)
from reference.lora.adapt import adapter_names, add_adapter, is_target, set_adapter
from reference.lora.layer import LoRAConfig, LoRALinear, check_is_whole
from reference.transformer import Llama

KEYS = Keys(
    file="adapter_config.json",
    honoured={
        "peft_type": TEXT, "r": COUNT, "lora_alpha": NUMBER, "lora_dropout": NUMBER,
        "use_rslora": FLAG, "target_modules": (list, str),
    },
    plain={
        "task_type": ("CAUSAL_LM",), "bias": ("none",), "use_dora": (False,),
        "fan_in_fan_out": (False,), "lora_bias": (False,), "use_qalora": (False,),
        "ensure_weight_tying": (False,),
        # PiSSA, OLoRA and others take what A and B begin as out of the base's weights.
        "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    },
    harmless=frozenset(
        "auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core "
        "qalora_group_size".split()
    ),
)  # fmt: skip
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Write one adapter; peft's `PeftModel.from_pretrained` reads the folder.

    Raises: ValueError for a name that the model does not have, or that has different shapes in
    different layers; for a model that is divided: its `full_state_dict` belongs into a whole one
    first.
    """
    for path, layer in _layers_by_path(model):
        check_is_whole(path, layer.base)
    if name not in adapter_names(model):
        raise ValueError(f"name: expected one of {adapter_names(model)}, got {name!r}")
    tensors: dict[str, Tensor] = {}
    configs, paths = set(), []
    for path, layer in _layers_by_path(model):
        if name in layer.adapters:
            adapter = layer.adapter(name)
            tensors[f"{_stored(model, path)}.lora_A.weight"] = adapter.a.detach().contiguous()
            tensors[f"{_stored(model, path)}.lora_B.weight"] = adapter.b.detach().contiguous()
            configs.add(replace(adapter.config, targets="all-linear"))
            paths.append(path)
    if len(configs) > 1:
        raise ValueError(f"{name}: expected one shape in all layers, got {len(configs)}")
    entries = _to_peft(configs.pop(), _targets_of(model, paths))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        weights, config = (stack.enter_context(replacing(folder / n)) for n in (WEIGHTS, CONFIG))
        save_file(tensors, weights, metadata={"format": "pt"})
        write_json(config, entries)


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> LoRAConfig:
    """Put an adapter of peft's on the model, under `name`, and activate it.

    All is checked before the model changes.

    Raises: FileNotFoundError for a folder without the two files; ValueError for a kind of adapter
    that is not LoRA or has a key that is not known, one for another base (names or shapes that do
    not fit), or a broken file.
    """
    folder = Path(folder)
    config = _from_peft(read_json(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS}: expected an adapter as peft stores it")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder}: cannot be read: {error}") from error
    if isinstance(model, Llama) and not isinstance(config.targets, str):
        own = tuple(target.removeprefix("model.") for target in config.targets)
        config = replace(config, targets=own)
    for path, module in model.named_modules():
        check_is_whole(path, module)
    _check_base(model, config, tensors)
    add_adapter(model, config, name)
    with torch.no_grad():
        for path, layer in _layers_by_path(model):
            if name in layer.adapters:
                adapter, prefix = layer.adapter(name), _stored(model, path)
                adapter.a.copy_(tensors[f"{prefix}.lora_A.weight"])
                adapter.b.copy_(tensors[f"{prefix}.lora_B.weight"])
    set_adapter(model, name)
    return config


def _layers_by_path(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]


def _stored(model: nn.Module, path: str) -> str:
    """A layer's name in peft's files: transformers has our Llama's layers in `model`, but its head
    beside it.
    """
    inside = isinstance(model, Llama) and path != "lm_head"
    return f"base_model.model.{'model.' if inside else ''}{path}"


def _targets_of(model: nn.Module, paths: list[str]) -> list[str]:
    """The targets that select these layers and no others: last names, or else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | LoRALinear)]
    selected = {p for p in linear if is_target(p.removesuffix(".base"), tuple(names))}
    if {p.removesuffix(".base") for p in selected} == set(paths):
        return names
    return sorted(_stored(model, path).removeprefix("base_model.model.") for path in paths)


def _to_peft(config: LoRAConfig, targets: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.is_rank_stabilised,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _from_peft(entries: dict[str, Any]) -> LoRAConfig:
    if entries.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {entries.get('peft_type')!r}")
    known = KEYS.read(entries)
    if missing := [k for k in ("r", "lora_alpha", "target_modules") if k not in known]:
        raise ValueError(f"adapter_config.json: expected also {', '.join(missing)}")
    targets = known["target_modules"]
    return LoRAConfig(
        rank=known["r"],
        alpha=known["lora_alpha"],
        dropout=known.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        is_rank_stabilised=known.get("use_rslora", False),
    )


def _check_base(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    """That file and model name the same layers, of the same shapes, and the file nothing else."""
    expected: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | LoRALinear) or path.endswith(".base"):
            continue
        if is_target(path, config.targets):
            fan_out, fan_in = module.weight.shape
            expected[f"{_stored(model, path)}.lora_A.weight"] = (config.rank, fan_in)
            expected[f"{_stored(model, path)}.lora_B.weight"] = (fan_out, config.rank)
    if differing := sorted(tensors.keys() ^ expected.keys()):
        raise ValueError(
            f"adapter: expected the {len(expected) // 2} target layers of this model, differs in "
            f"{', '.join(differing[:3])}: is it for another base?"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name}: expected {shape}, got {tuple(tensors[name].shape)}: is it for another "
                "base?"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name}: expected finite numbers; the adapter is broken")
