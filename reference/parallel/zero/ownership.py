"""Which unit of FSDP owns which parameter of a model.

A parameter that stands in several units (an embedding that is the head as well) belongs to the
root, which is there while they all compute: so it stays one parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

Place = tuple[nn.Module, str]


@dataclass(eq=False)
class Held:
    """A parameter, by its name in the model: `parameter` is this rank's shard, `shape` the whole's.

    `places` are all the modules and attributes where it stands.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    places: list[Place] = field(default_factory=list)


def take_over(model: nn.Module, units: list[nn.Module]) -> list[tuple[str, nn.Module, list[Held]]]:
    """(name, module, parameters) for each unit, the root first if it owns any.

    Raises: ValueError for units that are not modules of the model, twice, nested or without
    parameters; for parameters that are sharded already; TypeError for a recurrent layer.
    """
    names = {module: name for name, module in model.named_modules()}
    inside: set[nn.Module] = set()
    for module in units:
        if module not in names or module is model:
            raise ValueError(f"units: expected modules inside of the model, got {type(module)}")
        if module in inside:
            raise ValueError(f"units: {names[module]!r} is there twice, or inside of another unit")
        if not any(True for _ in module.parameters()):
            raise ValueError(f"units: {names[module]!r} has no parameters")
        inside |= set(module.modules())
    owner: dict[int, nn.Module] = {}
    for module in units:
        for parameter in module.parameters():
            owner[id(parameter)] = model if id(parameter) in owner else module
    for module in names.keys() - inside:
        for parameter in module.parameters(recurse=False):
            owner[id(parameter)] = model
    owned: dict[nn.Module, list[Held]] = {module: [] for module in (model, *units)}
    for held in _held(model):
        owned[owner[id(held.parameter)]].append(held)
    return [(names[module], module, held) for module, held in owned.items() if held]


def _held(model: nn.Module) -> list[Held]:
    """Every parameter once, with all its places."""
    found: dict[int, Held] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise TypeError(
                f"{prefix}: expected modules that read their parameters as attributes, got "
                f"{type(module).__name__}, which keeps a list of them besides"
            )
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}".lstrip(".")
            if hasattr(parameter, "whole_shape"):
                raise ValueError(f"model: {name} is sharded already; wrap a model once")
            if id(parameter) not in found:
                found[id(parameter)] = Held(name, parameter, tuple(parameter.shape))
            found[id(parameter)].places.append((module, attribute))
    if not found:
        raise ValueError("model: expected parameters, got none")
    return list(found.values())
