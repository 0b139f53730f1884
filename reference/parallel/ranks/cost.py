"""What an operation sends and how long it takes, in closed form.

A group of N ranks, M nodes. B is the payload: the tensor, or for gathers and scatters the whole of
which each rank has a part (nccl-tests' convention). A rank sends, on the wire:

    all_reduce                    2 (N-1)/N B    to the next rank: ring, 2 (N-1) steps of B/N
    all_gather, reduce_scatter      (N-1)/N B    to the next rank: ring, N-1 steps of B/N
    broadcast, reduce                       B    along a chain; its last rank sends nothing
    all_to_all                   what leaves     N-1 direct messages
    scatter, gather                       B/N    from, or to, the root for each other rank
    send                                    B    recv sends nothing      barrier   nothing

    seconds = latency of all steps + bytes of the busiest rank / bandwidth

A ring over M nodes crosses the network in M-1 of N-1 steps, and all ranks of a node carry their
share of it, each by its own adapter: bandwidth = min(intra, k inter) for k ranks a node. Direct
messages between nodes have one adapter each.

Source: ring all-reduce, Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009) 117-124.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from reference.parallel.ranks.calls import Call, Group
from reference.parallel.ranks.hardware import Hardware, Link

# On each of the N-1 hops of a ring: how often a part passes, and which share of B it is.
RING_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
CHAINS = ("broadcast", "reduce")


def payload_bytes(call: Call) -> int:
    """B of the table: the tensor, or the whole of which each rank has a part."""
    if call.operation in ("barrier", "agree"):
        return 0
    if call.operation in ("all_gather", "gather"):
        assert call.tensor is not None
        return call.tensor.nbytes * call.group.size
    if call.operation in ("scatter", "recv"):
        assert call.out is not None
        return call.out.nbytes * (call.group.size if call.operation == "scatter" else 1)
    assert call.tensor is not None
    return call.tensor.nbytes


def wire_bytes(call: Call) -> dict[int, float]:
    """What the calling rank sends, by global rank of the receiver; empty where nothing leaves."""
    ranks, size, here, payload = (
        call.group.ranks, call.group.size, call.group_rank, payload_bytes(call),
    )  # fmt: skip
    following = (here + 1) % size
    sent: dict[int, float] = {}
    if call.operation in RING_ROUNDS:
        sent = {following: RING_ROUNDS[call.operation] * (size - 1) / size * payload}
    elif call.operation == "broadcast" and following != call.root:
        sent = {following: payload}
    elif call.operation == "reduce" and here != call.root:
        sent = {following: payload}
    elif call.operation == "all_to_all":
        sent = _all_to_all_bytes(call)
    elif call.operation == "scatter" and here == call.root:
        sent = {other: payload / size for other in range(size)}
    elif call.operation in ("gather", "send") and here != call.root:
        assert call.root is not None
        sent = {call.root: payload / (size if call.operation == "gather" else 1)}
    return {ranks[to]: n for to, n in sent.items() if to != here and n}


def seconds(calls: Sequence[Call], hardware: Hardware) -> float:
    """How long the operation occupies its ranks, from when the last has arrived."""
    call, size = calls[0], calls[0].group.size
    if call.is_message:
        link = _link(call.group, call.channel, hardware)
        return link.latency_seconds + payload_bytes(call) / link.bytes_per_second
    if size == 1 or call.operation == "agree":
        return 0.0
    is_ring = call.operation in RING_ROUNDS or call.operation in CHAINS
    rounds = 2 if call.operation in ("all_reduce", "barrier") else 1
    latency = rounds * _latency(call.group, hardware, is_ring or call.operation == "barrier")
    return latency + _busiest_bytes(calls) / _bandwidth(call.group, hardware, is_ring)


def _busiest_bytes(calls: Sequence[Call]) -> float:
    call, size = calls[0], calls[0].group.size
    if call.operation in CHAINS:
        return payload_bytes(call)
    if call.operation in ("scatter", "gather"):
        return (size - 1) / size * payload_bytes(call)
    sent = [wire_bytes(c) for c in calls]
    received: Counter[int] = Counter()
    for one in sent:
        received.update(one)
    return max([sum(one.values()) for one in sent] + list(received.values()), default=0.0)


@lru_cache(maxsize=1024)
def _ranks_of_node(group: Group, hardware: Hardware) -> Counter[int]:
    return Counter(hardware.node(rank) for rank in group.ranks)


def _latency(group: Group, hardware: Hardware, is_ring: bool) -> float:
    """Of N-1 steps: each within a node or over the network."""
    ranks_of_node = _ranks_of_node(group, hardware)
    steps = group.size - 1
    over_network = len(ranks_of_node) - 1 if is_ring else group.size - max(ranks_of_node.values())
    return (
        over_network * hardware.inter.latency_seconds
        + (steps - over_network) * hardware.intra.latency_seconds
    )


def _bandwidth(group: Group, hardware: Hardware, is_ring: bool) -> float:
    ranks_of_node = _ranks_of_node(group, hardware)
    if len(ranks_of_node) == 1:
        return hardware.intra.bytes_per_second
    adapters = min(ranks_of_node.values()) if is_ring else 1
    return min(hardware.intra.bytes_per_second, adapters * hardware.inter.bytes_per_second)


def _link(group: Group, channel: tuple[int, int], hardware: Hardware) -> Link:
    sender, receiver = (hardware.node(group.ranks[i]) for i in channel)
    return hardware.intra if sender == receiver else hardware.inter


def _all_to_all_bytes(call: Call) -> dict[int, float]:
    assert call.tensor is not None and call.input_splits is not None
    rows = call.tensor.shape[0]
    row_bytes = call.tensor.nbytes / rows if rows else 0
    return {to: n * row_bytes for to, n in enumerate(call.input_splits)}
