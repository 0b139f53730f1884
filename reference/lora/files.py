"""Adapters as peft stores them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      (r, D)
                                                     lora_B.weight      (F, r)

`base_model.model.` is peft's wrapper, the next `model.` transformers' own; our Llama's names begin
after it. A model of transformers, whose names have it, is taken as well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.lora.adapt import adapter_names, add_adapter, is_target, set_adapter
from reference.lora.layer import LoRAConfig, LoRALinear, check_is_whole
from reference.transformer import Llama

# Variants that would change the numbers, and the values that leave them out.
PLAIN: dict[str, Any] = {
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Write one adapter; peft's `PeftModel.from_pretrained` reads the folder.

    Raises: ValueError for a name that the model does not have, or a model that is divided: its
    `full_state_dict` belongs into a whole one first.
    """
    for path, layer in _layers_by_path(model):
        check_is_whole(path, layer.base)
    if name not in adapter_names(model):
        raise ValueError(f"name: expected one of {adapter_names(model)}, got {name!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    configs, targets = set(), set()
    for path, layer in _layers_by_path(model):
        if name not in layer.adapters:
            continue
        adapter = layer.adapter(name)
        tensors[f"{_prefix(model)}{path}.lora_A.weight"] = adapter.a.detach().contiguous()
        tensors[f"{_prefix(model)}{path}.lora_B.weight"] = adapter.b.detach().contiguous()
        configs.add(adapter.config)
        targets.add(path.rpartition(".")[2])
    (config,) = configs
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_to_peft(config, sorted(targets)), indent=2))


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> LoRAConfig:
    """Put an adapter of peft's on the model, under `name`, and activate it.

    Raises: FileNotFoundError for a folder without the two files; ValueError for a kind of adapter
    that is not LoRA, one for another base (names or shapes that do not fit), or a broken file.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: expected an adapter as peft stores it")
    try:
        config = _from_peft(json.loads((folder / CONFIG).read_text()))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
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
                adapter, prefix = layer.adapter(name), f"{_prefix(model)}{path}"
                adapter.a.copy_(tensors[f"{prefix}.lora_A.weight"])
                adapter.b.copy_(tensors[f"{prefix}.lora_B.weight"])
    set_adapter(model, name)
    return config


def _layers_by_path(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]


def _prefix(model: nn.Module) -> str:
    return "base_model.model.model." if isinstance(model, Llama) else "base_model.model."


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
    for key, plain in PLAIN.items():
        if entries.get(key, plain) not in (plain, None):
            raise ValueError(f"{key}: expected {plain!r}, got {entries[key]!r}: not taught here")
    targets = entries["target_modules"]
    return LoRAConfig(
        rank=entries["r"],
        alpha=entries["lora_alpha"],
        dropout=entries.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        is_rank_stabilised=entries.get("use_rslora", False),
    )


def _check_base(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    """That file and model name the same layers, of the same shapes."""
    shapes = {
        f"{_prefix(model)}{path}": module.weight.shape
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | LoRALinear) and is_target(path, config.targets)
    }
    stored = {key.rsplit(".lora_", 1)[0] for key in tensors}
    if missing := sorted(stored ^ set(shapes)):
        raise ValueError(
            f"adapter: expected the {len(shapes)} target layers of this model, differs in "
            f"{', '.join(missing[:3])}: is it for another base?"
        )
    for path, (fan_out, fan_in) in shapes.items():
        found = tuple(tensors[f"{path}.lora_{m}.weight"].shape for m in "AB")
        if found != ((config.rank, fan_in), (fan_out, config.rank)):
            raise ValueError(
                f"{path}: expected A ({config.rank}, {fan_in}) and B ({fan_out}, {config.rank}), "
                f"got {found[0]} and {found[1]}: is it for another base?"
            )
