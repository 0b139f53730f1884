"""What reserving ahead wastes, and what sharing saves: counted on traces, without a model.

A request of P prompt tokens that answers with O holds P + 1, P + 2, ... P + O tokens, one iteration
each. What a cache sets aside for it meanwhile depends on the policy:

    "max"       max_len slots             room for the longest text there can be
    "pow2"      the next power of two of P + O
    "oracle"    P + O slots               the length is known ahead
    "paged"     what it holds, rounded up to whole blocks

Utilisation is slots held over slots set aside, both summed over iterations and requests.

Sources: the policies, vLLM, arXiv 2309.06180, sec. 6.1; sharing, sec. 4.4 and 6.3.
"""

import random
from collections.abc import Sequence

from reference.kv_cache.blocks import BlockManager
from reference.kv_cache.request import Iteration, Request

POLICIES = ("max", "pow2", "oracle", "paged")


def utilization(
    lengths: Sequence[tuple[int, int]],
    policy: str,
    *,
    max_len: int = 2048,
    block_size: int = 16,
) -> float:
    """The share of slots set aside that hold a token, for requests of (P, O) tokens.

    Raises: ValueError for an unknown policy, or a request longer than max_len.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    held = reserved = 0
    for prompt, output in lengths:
        total = prompt + output
        if total > max_len:
            raise ValueError(f"lengths: expected at most max_len={max_len}, got {total}")
        sizes = range(prompt + 1, total + 1)
        held += sum(sizes)
        if policy == "paged":
            reserved += sum(-(-size // block_size) * block_size for size in sizes)
        else:
            fixed = {"max": max_len, "pow2": 1 << (total - 1).bit_length(), "oracle": total}
            reserved += output * fixed[policy]
    return held / reserved if reserved else 0.0


def sampling_saved(prompt: int, output: int, num_samples: int, *, block_size: int = 16) -> float:
    """The share of blocks that `num_samples` answers to one prompt save by sharing it.

    The mean over all iterations of 1 - blocks in use / blocks in all tables; each sample grows by
    one token an iteration.
    """
    blocks = _room(prompt, output, num_samples, block_size)
    blocks.allocate(0, [0] * prompt)
    for child in range(1, num_samples):
        blocks.fork(0, child)
    saved = []
    for _ in range(output):
        for name in range(num_samples):
            blocks.append(name)
        saved.append(_saved(blocks))
    return sum(saved) / len(saved)


def beam_saved(
    prompt: int,
    output: int,
    num_beams: int,
    *,
    block_size: int = 16,
    stay: float = 0.0,
    seed: int = 0,
) -> float:
    """The same for beams: before each token, every beam goes on from a parent among the beams.

    A beam goes on from itself with probability `stay`, else from one drawn evenly; a real search
    lies between. Beams that die give their blocks back, so that much more than the prompt is
    shared.
    """
    blocks = _room(prompt, output, 2 * num_beams, block_size)
    blocks.allocate((0, 0), [0] * prompt)
    beams = [(0, 0)] * num_beams
    generator = random.Random(seed)
    saved = []
    for t in range(1, output + 1):
        parents = [beam if generator.random() < stay else generator.choice(beams) for beam in beams]
        children = [(t, i) for i in range(num_beams)]
        for parent, child in zip(parents, children, strict=True):
            blocks.fork(parent, child)
        for beam in set(beams):
            blocks.free(beam)
        for child in children:
            blocks.append(child)
        beams = children
        saved.append(_saved(blocks))
    return sum(saved) / len(saved)


def static_iterations(
    requests: Sequence[Request], *, batch_size: int, max_len: int
) -> list[Iteration]:
    """What static batching does with these requests, in order, padded to the longest prompt.

    Raises: ValueError for a batch_size below 1 or a batch that does not fit into max_len.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    history = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(r.prompt) for r in batch)
        steps = max(r.max_new_tokens for r in batch)
        if width + steps - 1 > max_len:
            raise ValueError(f"max_len: expected at least {width + steps - 1}, got {max_len}")
        for t in range(steps):
            going = [r for r in batch if t < r.max_new_tokens]
            history.append(
                Iteration(
                    prefill_tokens=len(batch) * width if t == 0 else 0,
                    decoded=len(batch) if t else 0,
                    num_running=len(going),
                    held_tokens=sum(len(r.prompt) + t for r in going),
                    used_slots=len(batch) * max_len,
                )
            )
    return history


def _room(prompt: int, output: int, num_sequences: int, block_size: int) -> BlockManager:
    return BlockManager(num_sequences * (-(-(prompt + output) // block_size) + 1), block_size)


def _saved(blocks: BlockManager) -> float:
    return 1 - (blocks.num_blocks - blocks.num_free) / sum(map(len, blocks.tables.values()))
