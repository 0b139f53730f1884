"""What a part takes over from the whole: everything but its size.

A parameter's part has its name, dtype and requires_grad; parameters that were one stay one; buffers
and the training mode are copied. Gradients begin anew, as in torch's parallelize_module. How a
parameter is divided stands in its module, `cuts`: gathering, clipping by the whole norm and
refusing what cannot be divided twice all read it there, and nothing guesses from names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from reference.parallel.ranks import Comm

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Cut:
    """A parameter's parts lie along `dim`, each on `copies` neighbouring ranks. None: all of it on
    every rank."""

    dim: int | None
    copies: int = 1

    def part(self, x: Tensor, comm: Comm | None, what: str) -> Tensor:
        """This rank's part of a tensor that all hold, a copy. Where it stays whole, needs no ranks.

        Raises: ValueError where it cannot be cut into equal parts.
        """
        if self.dim is None:
            return x.detach().clone()
        assert comm is not None
        num_parts = comm.size // self.copies
        if x.shape[self.dim] % num_parts:
            raise ValueError(
                f"{what}: expected a multiple of {num_parts}, the number of ranks, got "
                f"{x.shape[self.dim]}"
            )
        part = x.detach().chunk(num_parts, self.dim)[comm.rank // self.copies]
        return part.clone(memory_format=torch.contiguous_format)

    def whole(self, part: Tensor, comm: Comm) -> Tensor:
        """All parts together, on every rank. Collective where the parameter is divided."""
        if self.dim is None:
            return part
        gathered = comm.all_gather(part.transpose(0, self.dim).contiguous())
        if self.copies > 1:
            gathered = torch.cat(gathered.chunk(comm.size)[:: self.copies])
        return gathered.transpose(0, self.dim)


WHOLE = Cut(None)


def part_of(x: Tensor, comm: Comm, dim: int, what: str) -> Tensor:
    """This rank's part of a tensor that all hold, a copy.

    Raises: ValueError where it cannot be cut into equal parts.
    """
    return Cut(dim).part(x, comm, what)


def cut_of(module: nn.Module, name: str) -> Cut:
    """How this parameter of the module is divided."""
    return getattr(module, "cuts", {}).get(name, WHOLE)


def parameters_with_cuts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Cut]]:
    """As `named_parameters`, each with how it is divided."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}".lstrip("."), parameter, cut_of(module, name)


def adopt(
    new: nn.Module, old: nn.Module, comm: Comm | None = None, dims: Sequence[str] = ()
) -> None:
    """Give `new` what is `old`'s own: parameters, cut as new.cuts says, buffers, training mode.

    `dims` names a parameter's dimensions in messages. Modules inside are the caller's business.
    """
    new.training = old.training
    for name, parameter in old._parameters.items():
        cut = cut_of(new, name)
        what = name if cut.dim is None or not dims else dims[cut.dim]
        new.register_parameter(name, _part(parameter, cut, comm, what))
    for name, buffer in old._buffers.items():
        value = None if buffer is None else buffer.detach().clone()
        is_persistent = name not in old._non_persistent_buffers_set
        new.register_buffer(name, value, persistent=is_persistent)


def copied(module: Module) -> Module:
    """A module with copies of what is its own, in which others may take the place of those inside.

    The module itself stays what it is.
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._parameters, twin._buffers, twin._non_persistent_buffers_set = {}, {}, set()
    adopt(twin, module)
    return twin


def tie(new: nn.Module, old: nn.Module) -> None:
    """Make one parameter of `new`'s of those that are one in `old`.

    Raises: ValueError for a parameter that is gone, or that has to be cut in two ways.
    """
    first: dict[nn.Parameter, str] = {}
    for name, parameter in old.named_parameters(remove_duplicate=False):
        owner, own = _owner(new, name)
        if parameter not in first:
            first[parameter] = name
            continue
        other, other_own = _owner(new, first[parameter])
        if cut_of(owner, own) != cut_of(other, other_own):
            raise ValueError(
                f"{name}: expected a parameter of its own: it is {first[parameter]} as well, and "
                f"the two are cut in different ways; untie them by a clone"
            )
        owner.register_parameter(own, getattr(other, other_own))


def _part(
    parameter: nn.Parameter | None, cut: Cut, comm: Comm | None, what: str
) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(cut.part(parameter, comm, what), requires_grad=parameter.requires_grad)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
