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
    stop: int | None = None,
    length_penalty: float = 0.0,
) -> tuple[Int[Tensor, "N T"], Float[Tensor, " N"]]:
    """The best `num_beams` answers of up to `num_tokens` tokens and their scores, the best first.

    A score is the log-probability over length ** length_penalty: 0 ranks by the sum, 1 by the mean,
    and more prefers the longer. A beam that chooses `stop` is done, and the search ends when none
    that goes on scores better now than the worst that is done; shorter answers are filled up with
    `stop`. All of it as in transformers' beam search with early_stopping=False.

    Raises: ValueError for an empty prompt or counts below 1; OutOfBlocks.
    """
    _check(num_tokens, "num_beams", num_beams)
    beams: list[Hashable] = [object()]
    done: list[tuple[float, Tensor]] = []
    try:
        logits = _prefill(model, cache, beams[0], prompt)
        scores, history = torch.zeros_like(logits[:, 0]), prompt.new_empty(1, 0)
        while True:
            totals = (scores[:, None] + logits.log_softmax(-1)).flatten()
            scores, best = totals.topk(min(2 * num_beams, len(totals)))
            parents, tokens = best // logits.shape[-1], best % logits.shape[-1]
            history = torch.cat((history[parents], tokens[:, None]), 1)
            length = history.shape[1]
            is_end = (
                tokens == (-1 if stop is None else stop) if length < num_tokens else tokens > -1
            )
            worth = scores / length**length_penalty
            ended = is_end[:num_beams].nonzero()[:, 0]
            done += zip(worth[ended].tolist(), history[ended], strict=True)
            done = sorted(done, key=lambda answer: -answer[0])[:num_beams]
            on = (~is_end).nonzero()[:num_beams, 0]
            if not len(on) or (len(done) == num_beams and float(worth[on[0]]) <= done[-1][0]):
                return _stack(done, 0 if stop is None else stop, scores)
            scores, history = scores[on], history[on]
            beams = _follow(cache.blocks, beams, parents[on].tolist())
            logits = _decode(model, cache, beams, tokens[on])
    finally:
        _free(cache.blocks, beams)


def _stack(
    done: Sequence[tuple[float, Tensor]], fill: int, like: Tensor
) -> tuple[Int[Tensor, "N T"], Float[Tensor, " N"]]:
    """Answers of different lengths as rows, and their scores."""
    rows = torch.nn.utils.rnn.pad_sequence(
        [tokens for _, tokens in done], batch_first=True, padding_value=fill
    )
    return rows, like.new_tensor([score for score, _ in done])


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
