"""Generation with a cache: the prompt in one pass (prefill), then one token a pass (decode).

    prefill    T tokens through the model, their keys and values kept
    decode     1 token through the model; it attends to all that is kept

Prompts of different lengths are padded at the left, so that every row's next token stands in the
same column. Then a column is not a position: row b's first token is at position 0 wherever it
stands, and no query may see the padding before it.

Shapes: B batch, T new tokens, S keys, N tokens generated, V vocabulary.
Source: prefill and decode as two phases, Orca (OSDI 2022), sec. 2.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference.kv_cache.dynamic import ColumnedCache, DynamicCache
from reference.transformer.model import SequenceCache
from reference.transformer.sampling import greedy
from reference.transformer.stopping import Stop, has_ended

# model(tokens, positions, cache, mask=..., num_logits=1) gives (B, 1, V); Llama is one.
CachedModel = Callable[..., Float[Tensor, "B 1 V"]]


def left_pad(
    prompts: Sequence[Int[Tensor, " _"]], pad: int = 0
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """One batch of prompts that end together, and how many columns of padding each row has.

    Raises: ValueError for no prompts, an empty one, or one that is not a row of tokens.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    for i, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(
                f"prompts[{i}]: expected a row of at least one token, got shape "
                f"{tuple(prompt.shape)}"
            )
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts], device=prompts[0].device)
    rows = [torch.cat((p.new_full((longest - len(p),), pad), p)) for p in prompts]
    return torch.stack(rows), padding


def column_mask(
    key_columns: Int[Tensor, " S"],
    query_columns: Int[Tensor, " T"],
    padding: Int[Tensor, " B"],
    window: int | None = None,
) -> Bool[Tensor, "B 1 T S"]:
    """True where a query sees a key: not later, not padding, not beyond the window."""
    distance = query_columns[:, None] - key_columns[None, :]
    is_seen = distance >= 0
    if window is not None:
        is_seen = is_seen & (distance < window)
    is_token = key_columns >= padding[:, None]
    return (is_seen & is_token[:, None])[:, None]


@torch.no_grad()
def generate(
    model: CachedModel,
    prompts: Sequence[Int[Tensor, " _"]],
    num_tokens: int,
    *,
    cache: SequenceCache | None = None,
    choose: Callable[[Tensor], Tensor] = greedy,
    stop: Stop | None = None,
    chunk_size: int | None = None,
) -> Int[Tensor, "B N"]:
    """Up to `num_tokens` new tokens after each prompt; the prompts themselves are not returned.

    `cache` is a fresh growing one by default, and holds everything but the last token afterwards.
    `stop` is a token or a question to a row's tokens so far (`stop_strings`): a row goes on with
    the token that it ended with, and generation ends when all rows have.
    `chunk_size` cuts the prefill into pieces, for less memory at the same result.

    Raises: ValueError for prompts that are missing or empty, for negative num_tokens, a cache that
    is not empty, or a chunk_size below 1.
    """
    cache = DynamicCache() if cache is None else cache
    _check(cache, num_tokens, chunk_size)
    tokens, padding = left_pad(prompts)
    if num_tokens == 0:
        return tokens[:, :0]
    for chunk in tokens.split(chunk_size or tokens.shape[1], 1):
        logits = _forward(model, chunk, cache, padding)
    chosen: list[Tensor] = []
    is_done = torch.zeros_like(padding, dtype=torch.bool)
    while True:
        token = choose(logits[:, -1])
        chosen.append(torch.where(is_done, chosen[-1], token) if chosen else token)
        if stop is not None:
            is_done = is_done | has_ended(stop, chosen)
        if len(chosen) == num_tokens or (stop is not None and bool(is_done.all())):
            return torch.stack(chosen, 1)
        logits = _forward(model, chosen[-1][:, None], cache, padding)


def _forward(model: CachedModel, tokens: Tensor, cache: SequenceCache, padding: Tensor) -> Tensor:
    """The last logits; a mask only where the model's own, causal over all keys, is not enough."""
    past, new = cache.get_seq_length(), tokens.shape[1]
    columns = torch.arange(past, past + new, device=tokens.device)
    positions, mask = columns, None
    is_ragged, is_columned = bool(padding.any()), isinstance(cache, ColumnedCache)
    if is_ragged:
        positions = (columns - padding[:, None]).clamp(min=0)  # (B, T)
    if is_ragged or (is_columned and new > 1):
        if isinstance(cache, ColumnedCache):
            keys = cache.key_columns(new).to(tokens.device)
        else:
            keys = torch.arange(past + new, device=tokens.device)
        mask = column_mask(keys, columns, padding, getattr(cache, "window", None))
    return model(tokens, positions, cache, mask=mask, num_logits=1)


def _check(cache: SequenceCache, num_tokens: int, chunk_size: int | None) -> None:
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if cache.get_seq_length():
        raise ValueError(
            f"cache: expected an empty one, got one with {cache.get_seq_length()} tokens; "
            "a cache belongs to one batch of texts"
        )
