"""Several answers to one prompt on shared blocks: parallel samples, and beams.

The prompt goes through the model once. Every answer has a table of its own that begins with the
same blocks; who writes into a block that others name as well gets a copy of it first. A beam that
dies gives back what nobody else names, so that beams share all that they have in common.

Shapes: N answers, T tokens generated, V vocabulary.
Source: vLLM, arXiv 2309.06180, sec. 4.4 (parallel sampling, beam search).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.kv_cache.blocks import BlockManager
from reference.kv_cache.generation import CachedModel
from reference.kv_cache.paged import PagedCache
from reference.transformer.sampling import sample


@torch.no_grad()
def sample_parallel(
    model: CachedModel,
    prompt: Int[Tensor, " P"],
    num_tokens: int,
    *,
    num_samples: int,
    cache: PagedCache,
    choose: Callable[[Tensor], Tensor] = sample,
) -> Int[Tensor, "N T"]:
    """`num_samples` answers to one prompt; all blocks are given back, after an error as well.

    Raises: ValueError for an empty prompt or counts below 1; OutOfBlocks.
    """
    _check(num_tokens, "num_samples", num_samples)
    names = [object() for _ in range(num_samples)]
    try:
        logits = _prefill(model, cache, names[0], prompt)
        for name in names[1:]:
            cache.blocks.fork(names[0], name)
        chosen = [choose(logits.expand(num_samples, -1))]
        while len(chosen) < num_tokens:
            chosen.append(choose(_decode(model, cache, names, chosen[-1])))
        return torch.stack(chosen, 1)
    finally:
        _free(cache.blocks, names)


@torch.no_grad()
def beam_search(
    model: CachedModel,
    prompt: Int[Tensor, " P"],
    num_tokens: int,
    *,
    num_beams: int,
    cache: PagedCache,
) -> tuple[Int[Tensor, "N T"], Float[Tensor, " N"]]:
    """The beams after `num_tokens` tokens and their log-probabilities, the best first.

    Raises: ValueError for an empty prompt or counts below 1; OutOfBlocks.
    """
    _check(num_tokens, "num_beams", num_beams)
    beams: list[Hashable] = [object()]
    try:
        logits = _prefill(model, cache, beams[0], prompt)
        scores, history = torch.zeros_like(logits[:, 0]), prompt.new_empty(1, 0)
        while True:
            totals = scores[:, None] + logits.log_softmax(-1)
            scores, best = totals.flatten().topk(min(num_beams, totals.numel()))
            parents, tokens = best // logits.shape[-1], best % logits.shape[-1]
            history = torch.cat((history[parents], tokens[:, None]), 1)
            if history.shape[1] == num_tokens:
                return history, scores
            beams = _follow(cache.blocks, beams, parents.tolist())
            logits = _decode(model, cache, beams, tokens)
    finally:
        _free(cache.blocks, beams)


def _follow(
    blocks: BlockManager, beams: Sequence[Hashable], parents: Sequence[int]
) -> list[Hashable]:
    """A child for each parent named; beams that nobody goes on from are gone."""
    children: list[Hashable] = [object() for _ in parents]
    for parent, child in zip(parents, children, strict=True):
        blocks.fork(beams[parent], child)
    _free(blocks, beams)
    return children


def _prefill(model: CachedModel, cache: PagedCache, name: Hashable, prompt: Tensor) -> Tensor:
    num_cached = cache.blocks.allocate(name, prompt.tolist())
    tokens = prompt[None, num_cached:]
    batch = cache.batch([name], tokens.shape[1])
    return model(tokens, batch.positions, batch, mask=batch.mask, num_logits=1)[:, -1]


def _decode(
    model: CachedModel, cache: PagedCache, names: Sequence[Hashable], tokens: Tensor
) -> Tensor:
    for name in names:
        cache.copy(cache.blocks.append(name))
    batch = cache.batch(names, 1)
    return model(tokens[:, None], batch.positions, batch, mask=batch.mask, num_logits=1)[:, -1]


def _free(blocks: BlockManager, names: Sequence[Hashable]) -> None:
    for name in names:
        if name in blocks.tables:
            blocks.free(name)


def _check(num_tokens: int, what: str, count: int) -> None:
    for name, number in (("num_tokens", num_tokens), (what, count)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
