"""Adapters on a whole model: put on, switched, merged, taken off.

A LoRALinear takes the place of each linear layer that is a target; everything else is frozen. The
model's code does not change, and its forward pass knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reference.lora.layer import Adapter, LoRAConfig, LoRALinear, check_is_whole


def add_adapter(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Put a new adapter on the model's target layers, freeze all else, and activate it.

    Returns the model, changed in place. "all-linear" leaves out the head, as peft does.

    All is checked before anything changes.

    Raises: ValueError for targets that match nothing, a name that is taken or that a module cannot
    have (with a dot), a rank above a matrix's, base weights that are not finite, a model that is
    divided already, or while adapters are merged.
    """
    found = list(_targets(model, config.targets))
    if not found:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _linear(m)})
        raise ValueError(f"targets: expected some of {', '.join(linear)}; got {config.targets!r}")
    if not found[0][0]:
        raise ValueError("model: expected a module around the linear layers, got one of them")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name: expected one that a module may have, got {name!r}; without dots: "
            f"{(name or 'default').replace('.', '_')!r}"
        )
    _check_unmerged("add_adapter", model)
    for path, layer in found:
        check_is_whole(path, layer.base if isinstance(layer, LoRALinear) else layer)
        weight = layer.weight
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"{path}: expected finite weights; the base is broken")
        if config.rank > min(weight.shape):
            raise ValueError(
                f"rank: expected at most {min(weight.shape)} for {path} {tuple(weight.shape)}, got "
                f"{config.rank}"
            )
        if isinstance(layer, LoRALinear) and name in layer.adapters:
            raise ValueError(f"name: {name!r} is there already; take another name")
    if not any(isinstance(m, Adapter) for m in model.modules()):
        model.requires_grad_(False)
    for path, layer in found:
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
        layer.add(name, config)
    set_adapter(model, name)
    return model


def set_adapter(model: nn.Module, *names: str) -> None:
    """Activate these adapters, added up, and no others; none gives the base model.

    Only active ones require gradients.

    Raises: ValueError for a name that no layer has, or while adapters are merged.
    """
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"name: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    _check_unmerged("set_adapter", model)
    for layer in lora_layers(model):
        layer.active = [name for name in names if name in layer.adapters]
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def merge(model: nn.Module) -> None:
    """Add the active adapters into the weights: the base's cost from now on. All layers or none.

    Raises: ValueError where they are merged already, nothing is there, sums are not finite, or an
    adapted weight is used elsewhere as well, as a tied head's is: the embedding would change too.
    """
    layers = _some_layers(model)
    _check_unmerged("merge", model)
    _check_own_weights(model)
    done: list[LoRALinear] = []
    try:
        for layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit. Raises: ValueError where nothing is merged."""
    layers = _some_layers(model)
    if any(layer._unmerged is None for layer in layers):
        raise ValueError("unmerge: nothing is merged, or not everywhere")
    for layer in layers:
        layer.unmerge()


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters off, and put the linear layers back, with what is merged into them."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.base)
    return model


@contextmanager
def use_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """While entered, row i of each batch goes through the adapter names[i]; None is the base.

    Raises: ValueError for an unknown name, or while adapters are merged.
    """
    known = adapter_names(model)
    unknown = sorted({str(name) for name in names if name is not None and name not in known})
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    layers = list(lora_layers(model))
    _check_unmerged("use_rows", model)
    for layer in layers:
        order = list(layer.adapters)
        index = [order.index(n) if n is not None and n in order else -1 for n in names]
        layer.rows = torch.tensor(index, device=layer.weight.device)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """The model's adapted layers."""
    return (m for m in model.modules() if isinstance(m, LoRALinear))


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order in which they came."""
    return list(dict.fromkeys(name for layer in lora_layers(model) for name in layer.adapters))


def trainable_parameters(model: nn.Module) -> list[Tensor]:
    """Parameters that require a gradient: what the optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _some_layers(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("model: expected adapters, found none; add_adapter puts them on")
    return layers


def _check_unmerged(what: str, model: nn.Module) -> None:
    if any(layer._unmerged is not None for layer in lora_layers(model)):
        raise ValueError(f"{what}: the adapters are merged already; unmerge first")


def _check_own_weights(model: nn.Module) -> None:
    """That each adapted weight belongs to one module alone."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for own in module.parameters(recurse=False):
            owners.setdefault(own.data_ptr() or id(own), []).append(path)
    for layer in lora_layers(model):
        if layer.active and len(users := owners[layer.weight.data_ptr() or id(layer.weight)]) > 1:
            raise ValueError(
                f"merge: expected a weight of its own, {' and '.join(users)} share one; give the "
                "adapted layer a copy first (weight = nn.Parameter(weight.clone()))"
            )


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LoRALinear)


def _targets(
    model: nn.Module, targets: tuple[str, ...] | str
) -> Iterator[tuple[str, nn.Linear | LoRALinear]]:
    inside = {layer.base for layer in lora_layers(model)}
    for path, module in model.named_modules():
        if module in inside or not isinstance(module, nn.Linear | LoRALinear):
            continue
        if is_target(path, targets):
            yield path, module


def is_target(path: str, targets: tuple[str, ...] | str) -> bool:
    """Whether a module's path is one of the targets, or ends with one after a dot."""
    if targets == "all-linear":
        return path.rpartition(".")[2] != "lm_head"
    return any(path == target or path.endswith(f".{target}") for target in targets)
