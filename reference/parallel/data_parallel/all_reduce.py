"""All-reduce out of messages: what a collective library does below its one call.

N ranks hold a tensor of B bytes each and want the sum on all. `ring` cuts it into N parts: in N-1
steps each rank passes a part to its neighbour, which adds its own (reduce-scatter), and in N-1 more
the finished parts go round (all-gather). No rank ever has more to send than any other.

              steps             bytes that the busiest rank sends
    star      2 (N-1)           (N-1) B              one rank sums, then tells all
    tree      2 ceil(log2 N)    up to ceil(log2 N) B pairs, pairs of pairs, and back
    ring      2 (N-1)           2 (N-1)/N B
    gossip    N-1               (N-1) B              all-gather, and each sums for itself

A step over a link takes alpha + bytes / bandwidth: few steps win for small tensors, few bytes for
large ones.

Papers: ring, Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009) 117-124; the others and
their costs, Thakur, Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19 (2005) 49-66.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from reference.parallel.options import at_least, one_of
from reference.parallel.ranks import Comm, Link


def ring_reduce_scatter(comm: Comm, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " n"]:
    """This rank's part of the sum, flat: of N parts that differ by one element at most, part r."""
    return _pass_round_and_add(comm, _parts(comm, tensor))


def ring_all_gather(comm: Comm, parts: list[Tensor]) -> list[Tensor]:
    """Fill `parts`, of which this rank's own, number r, is finished, with those of the others."""
    for step in range(comm.size - 1):
        _exchange(
            comm, parts[(comm.rank - step) % comm.size], parts[(comm.rank - step - 1) % comm.size]
        )
    return parts


def ring_all_reduce(comm: Comm, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, new, by 2 (N-1) steps round the ring."""
    parts = _parts(comm, tensor)
    _pass_round_and_add(comm, parts)
    return torch.cat(ring_all_gather(comm, parts)).view(tensor.shape)


def star_all_reduce(comm: Comm, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, new: rank 0 receives all, adds, and sends the sum to each."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    if comm.rank:
        comm.send(total, 0)
        return comm.recv(total, 0)
    arriving = torch.empty_like(total)
    for other in range(1, comm.size):
        total += comm.recv(arriving, other)
    for other in range(1, comm.size):
        comm.send(total, other)
    return total


def tree_all_reduce(comm: Comm, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, new: up a binomial tree to rank 0, and down again."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    arriving = torch.empty_like(total)
    distances = [2**i for i in range(math.ceil(math.log2(comm.size)))] if comm.size > 1 else []
    for distance in distances:
        if comm.rank % (2 * distance) == distance:
            comm.send(total, comm.rank - distance)
        elif comm.rank % (2 * distance) == 0 and comm.rank + distance < comm.size:
            total += comm.recv(arriving, comm.rank + distance)
    for distance in reversed(distances):
        if comm.rank % (2 * distance) == distance:
            comm.recv(total, comm.rank - distance)
        elif comm.rank % (2 * distance) == 0 and comm.rank + distance < comm.size:
            comm.send(total, comm.rank + distance)
    return total


def gossip_all_reduce(comm: Comm, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, new: whole tensors go round the ring, and each rank adds them all."""
    tensors = [torch.empty_like(tensor) for _ in range(comm.size)]
    tensors[comm.rank] = tensor.clone(memory_format=torch.contiguous_format)
    ring_all_gather(comm, tensors)
    total = tensors[0].clone()
    for other in tensors[1:]:
        total += other
    return total


ALGORITHMS = {
    "star": star_all_reduce,
    "tree": tree_all_reduce,
    "ring": ring_all_reduce,
    "gossip": gossip_all_reduce,
}


class AllReduceCost(NamedTuple):
    """Messages one after the other, and what the busiest rank sends."""

    num_steps: int
    bytes_a_step: float
    busiest_bytes: float

    def seconds(self, link: Link) -> float:
        """By the alpha-beta model, on ranks that are all joined by such links."""
        step = link.latency_seconds + self.bytes_a_step / link.bytes_per_second
        return self.num_steps * step


def all_reduce_cost(algorithm: str, world_size: int, num_bytes: float) -> AllReduceCost:
    """What an algorithm costs for a tensor of `num_bytes` bytes that divides by the world.

    Raises: ValueError for an unknown algorithm or a world below 1.
    Source: the table of this module.
    """
    one_of("algorithm", algorithm, ALGORITHMS)
    at_least(1, [("world_size", world_size)])
    n, levels = world_size, math.ceil(math.log2(world_size))
    return {
        "star": AllReduceCost(2 * (n - 1), num_bytes, (n - 1) * num_bytes),
        "tree": AllReduceCost(2 * levels, num_bytes, levels * num_bytes),
        "ring": AllReduceCost(2 * (n - 1), num_bytes / n, 2 * (n - 1) / n * num_bytes),
        "gossip": AllReduceCost(n - 1, num_bytes, (n - 1) * num_bytes),
    }[algorithm]


def _parts(comm: Comm, tensor: Tensor) -> list[Tensor]:
    flat = tensor.detach().flatten()
    return [part.clone() for part in flat.tensor_split(comm.size)]


def _pass_round_and_add(comm: Comm, parts: list[Tensor]) -> Tensor:
    """After N-1 steps part r of rank r holds the sum. In place."""
    for step in range(comm.size - 1):
        leaving = parts[(comm.rank - step - 1) % comm.size]
        own = parts[(comm.rank - step - 2) % comm.size]
        arriving = torch.empty_like(own)
        _exchange(comm, leaving, arriving)
        own += arriving
    return parts[comm.rank]


def _exchange(comm: Comm, leaving: Tensor, arriving: Tensor) -> None:
    """Send to the next rank while receiving from the previous one: neither waits for the other."""
    sending = comm.isend(leaving, (comm.rank + 1) % comm.size)
    comm.recv(arriving, (comm.rank - 1) % comm.size)
    sending.wait()
