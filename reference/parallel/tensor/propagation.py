"""From a few annotations to a program: which tensors are divided how, and what travels.

A program is a list of einsums. Somebody says of a few tensors which dimension lies along which axis
of the mesh; the rest follows: dimensions with the same letter in one einsum lie alike. What then
does not fit is moved:

    a letter that is summed lies along an axis    all ranks have summands: all-reduce
    an input lies otherwise than it is needed     all-gather it, then take a slice

Source: GSPMD, Xu et al., arXiv 2105.04663, sec. 3: annotation, propagation, partitioning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.parallel.ranks import Mesh

Sharding = tuple[str | None, ...]  # for each dimension the axis along which it is divided


@dataclass(frozen=True)
class Einsum:
    """One step: `output = einsum(equation, *inputs)`, such as "btd,df->btf"."""

    output: str
    equation: str
    inputs: tuple[str, ...]

    @property
    def letters(self) -> list[str]:
        """Of the inputs, then of the output."""
        left, _, right = self.equation.partition("->")
        return [*left.split(","), right]


@dataclass(frozen=True)
class Move:
    """A collective that a step needs: before it, of an input, or after it, of the output."""

    step: str
    operation: str
    tensor: str
    axis: str


def propagate(steps: Sequence[Einsum], annotations: Mapping[str, Sharding]) -> dict[str, Sharding]:
    """The sharding of every tensor: annotations spread along letters, forward and back, until
    nothing changes. What is annotated stays as it is; an axis divides a tensor once at most.

    Raises: ValueError for an annotation that does not fit its tensor, or fits none.
    """
    known: dict[str, list[str | None]] = {}
    for step in steps:
        for name, letters in zip((*step.inputs, step.output), step.letters, strict=True):
            given = annotations.get(name)
            if given is not None and len(given) != len(letters):
                raise ValueError(f"{name}: expected {len(letters)} axes or None, got {given}")
            known.setdefault(name, list(given) if given else [None] * len(letters))
    for name, given in annotations.items():
        axes = [axis for axis in given if axis is not None]
        if name not in known or len(set(axes)) < len(axes):
            raise ValueError(
                f"{name}: expected one of {', '.join(known)}, each axis once; got {given}"
            )
    changed = True
    while changed:
        changed = any([_spread(step, known, annotations) for step in (*steps, *reversed(steps))])
    return {name: tuple(axes) for name, axes in known.items()}


def _spread(
    step: Einsum, known: dict[str, list[str | None]], fixed: Mapping[str, Sharding]
) -> bool:
    """Within one step, from each letter that has an axis to the tensors that have none there."""
    names = (*step.inputs, step.output)
    changed = False
    for source, letters in zip(names, step.letters, strict=True):
        for letter, axis in zip(letters, known[source], strict=True):
            for target, others in zip(names, step.letters, strict=True):
                if axis is None or target in fixed or letter not in others:
                    continue
                place = others.index(letter)
                if known[target][place] is None and axis not in known[target]:
                    known[target][place] = axis
                    changed = True
    return changed


def moves(steps: Sequence[Einsum], shardings: Mapping[str, Sharding]) -> list[Move]:
    """The collectives of the program, in order."""
    return [move for step in steps for move in _moves_of(step, shardings)]


def _moves_of(step: Einsum, shardings: Mapping[str, Sharding]) -> list[Move]:
    axis_of = _letters_to_axes(step, shardings)
    found = []
    for name, letters in zip(step.inputs, step.letters[:-1], strict=True):
        for letter, axis in zip(letters, shardings[name], strict=True):
            if axis is not None and axis_of.get(letter) != axis:
                found.append(Move(step.output, "all_gather", name, axis))
    for letter, axis in axis_of.items():
        if letter not in step.letters[-1]:
            found.append(Move(step.output, "all_reduce", step.output, axis))
    return found


def _letters_to_axes(step: Einsum, shardings: Mapping[str, Sharding]) -> dict[str, str]:
    """How the step computes: as its output lies; summed letters as all inputs agree."""
    output = step.letters[-1]
    axis_of = {letter: axis for letter, axis in
               zip(output, shardings[step.output], strict=True) if axis is not None}  # fmt: skip
    for letter in dict.fromkeys("".join(step.letters[:-1])):
        axes = {
            shardings[name][letters.index(letter)]
            for name, letters in zip(step.inputs, step.letters[:-1], strict=True)
            if letter in letters
        }
        axis = axes.pop() if len(axes) == 1 else None
        if letter not in output and axis is not None and axis not in axis_of.values():
            axis_of[letter] = axis
    return axis_of


def execute(
    steps: Sequence[Einsum],
    shardings: Mapping[str, Sharding],
    parts: Mapping[str, Tensor],
    mesh: Mesh,
) -> dict[str, Tensor]:
    """Run the program on this rank's parts of the inputs; its parts of everything.

    Raises: ValueError for an input that is missing.
    """
    values = dict(parts)
    for step in steps:
        axis_of = _letters_to_axes(step, shardings)
        operands = []
        for name, letters in zip(step.inputs, step.letters[:-1], strict=True):
            if name not in values:
                raise ValueError(f"{name}: expected among {', '.join(values)}")
            operands.append(_as_needed(values[name], letters, shardings[name], axis_of, mesh))
        value = torch.einsum(step.equation, *operands)
        for move in _moves_of(step, shardings):
            if move.operation == "all_reduce":
                value = mesh[move.axis].all_reduce(value.contiguous())
        values[step.output] = value
    return values


def part_by(whole: Tensor, sharding: Sharding, mesh: Mesh) -> Tensor:
    """This rank's part of a tensor that divides by the axes of its sharding.

    Raises: ValueError where it does not.
    """
    for dim, axis in enumerate(sharding):
        if axis is not None:
            if whole.shape[dim] % mesh.shape[axis]:
                raise ValueError(
                    f"whole: expected dimension {dim} to be a multiple of {mesh.shape[axis]}, the "
                    f"size of {axis}, got {tuple(whole.shape)}; pad it"
                )
            whole = whole.chunk(mesh.shape[axis], dim)[mesh.coordinates[axis]]
    return whole


def _as_needed(
    value: Tensor, letters: str, sharding: Sharding, axis_of: dict[str, str], mesh: Mesh
) -> Tensor:
    for dim, (letter, axis) in enumerate(zip(letters, sharding, strict=True)):
        needed = axis_of.get(letter)
        if axis == needed:
            continue
        if axis is not None:
            moved = mesh[axis].all_gather(value.transpose(0, dim).contiguous())
            value = moved.transpose(0, dim)
        if needed is not None:
            value = value.chunk(mesh.shape[needed], dim)[mesh.coordinates[needed]]
    return value
