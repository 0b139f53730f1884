"""A scheduler's steps on a model: continuous batching, and static batching to compare with.

All running sequences decode one token together, each from its own blocks at its own position. Where
some of them prefill, their prompts and the others' single tokens go through the model in one row.

Sources: Orca (OSDI 2022), sec. 3 and 4; vLLM, arXiv 2309.06180, sec. 4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reference.kv_cache.generation import CachedModel, generate
from reference.kv_cache.paged import FlatBatch, PagedBatch, PagedCache
from reference.kv_cache.request import Iteration, Request, Step
from reference.kv_cache.scheduler import Scheduler, run
from reference.kv_cache.simulation import static_iterations
from reference.kv_cache.static import StaticCache
from reference.transformer.sampling import greedy
from reference.transformer.stopping import Stop


@torch.no_grad()
def compute_step(
    model: CachedModel,
    cache: PagedCache,
    step: Step,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> list[int | None]:
    """The next token of each sequence of a step: those of prefill, then those of decode.

    None for a sequence whose logits hold NaN or no finite largest one: it fails, and `choose` does
    not see its row.
    """
    cache.copy(step.copies)
    sequences = [s for s, _ in step.prefill] + step.decode
    names = [s.request.name for s in sequences]
    device, num_logits = cache.keys.device, 1
    batch: PagedBatch | FlatBatch
    if step.prefill:
        parts = [s.tokens[num_cached:] for s, num_cached in step.prefill]
        parts += [s.generated[-1:] for s in step.decode]
        batch = cache.flat_batch(names, [len(part) for part in parts])
        tokens = batch.row([torch.tensor(part, device=device) for part in parts])
        num_logits = len(names)
    else:
        batch = cache.batch(names, 1)
        tokens = torch.tensor([s.generated[-1:] for s in sequences], device=device)
    logits = model(tokens, batch.positions, batch, mask=batch.mask, num_logits=num_logits)
    rows = logits.flatten(0, 1)
    is_good = rows.amax(-1).isfinite()
    if not bool(is_good.all()):
        rows = rows.masked_fill(~is_good[:, None], 0)
    chosen = zip(choose(rows).tolist(), is_good.tolist(), strict=True)
    return [token if good else None for token, good in chosen]


def serve(
    model: CachedModel,
    requests: Sequence[Request],
    cache: PagedCache,
    *,
    max_batch: int,
    reserve: int = 0,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: Stop | None = None,
) -> tuple[dict[str, list[int]], list[Iteration]]:
    """Answers by name from continuous batching over a paged cache, and what each iteration did.

    A request whose logits are NaN has no answer: `Iteration.failed` names it. All blocks are given
    back, after an error as well.

    Raises: as `scheduler.run`.
    """
    scheduler = Scheduler(cache.blocks, max_batch=max_batch, reserve=reserve)
    return run(requests, scheduler, lambda s: compute_step(model, cache, s, choose), stop=stop)


def serve_static(
    model: CachedModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    max_len: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: int | None = None,
) -> tuple[dict[str, list[int]], list[Iteration]]:
    """The same from static batching: `batch_size` requests in order, until the longest is done.

    Each row has a static cache of `max_len` tokens. Arrivals are not looked at: all are there.

    Raises: ValueError for a batch that does not fit into max_len, or a batch_size below 1.
    """
    history = static_iterations(requests, batch_size=batch_size, max_len=max_len)
    answers: dict[str, list[int]] = {}
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        prompts = [torch.tensor(r.prompt) for r in batch]
        longest = max(r.max_new_tokens for r in batch)
        cache = StaticCache(max_len)
        rows = generate(model, prompts, longest, cache=cache, choose=choose, stop=stop)
        for request, row in zip(batch, rows.tolist(), strict=True):
            answer = row[: request.max_new_tokens]
            answers[request.name] = answer[: answer.index(stop) + 1] if stop in answer else answer
    return answers, history
