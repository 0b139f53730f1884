"""Chapter 06: wrong answers that people give, and right ones in another form."""

import heapq
import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

KEPT = "2. Keys and values, and no queries"
POSITIONS = "3. Positions"
STATIC = "4. The static cache"
RAGGED = "5. Prompts of different lengths"
ROLLING = "6. The rolling cache"
PAGES = "7. Pages"
SERVING = "8. Continuous batching"
BYTES = "9. Bytes"
COST = "10. What decoding costs"


# cached_attention


def _attend(q, keys, values, hidden=None):
    scores = q @ keys.T / math.sqrt(q.shape[1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ values


def _later(new, total, past):
    return torch.arange(total) > torch.arange(past, past + new)[:, None]


def _join(old, new):
    return new if old is None else torch.cat((old, new))


@misconception(
    "cached_attention",
    "You keep the tokens and compute all keys and values again for each chunk. The answer is right "
    "and nothing is saved: keep k and v themselves.",
    see=KEPT,
)
def recomputes_the_past(chunks, w_q, w_k, w_v):
    text, outputs = None, []
    for x in chunks:
        text = _join(text, x)
        past = len(text) - len(x)
        hidden = _later(len(x), len(text), past)
        outputs.append(_attend(x @ w_q, text @ w_k, text @ w_v, hidden))
    return outputs


@misconception(
    "cached_attention",
    "You run the whole text through attention for each chunk and keep the last rows: the past is "
    "computed again, queries and all. A cache holds keys and values, and only new rows come in.",
    see=KEPT,
)
def runs_everything_again(chunks, w_q, w_k, w_v):
    text, outputs = None, []
    for x in chunks:
        text = _join(text, x)
        hidden = _later(len(text), len(text), 0)
        outputs.append(_attend(text @ w_q, text @ w_k, text @ w_v, hidden)[-len(x) :])
    return outputs


@misconception(
    "cached_attention",
    "You cache queries as well. An old query has been answered and nobody asks for it again; only "
    "keys and values are read by later tokens.",
    see=KEPT,
)
def caches_queries(chunks, w_q, w_k, w_v):
    queries = keys = values = None
    outputs = []
    for x in chunks:
        queries, keys, values = (
            _join(old, x @ w) for old, w in ((queries, w_q), (keys, w_k), (values, w_v))
        )
        hidden = _later(len(queries), len(keys), 0)
        outputs.append(_attend(queries, keys, values, hidden)[-len(x) :])
    return outputs


def _cached(chunks, w_q, w_k, w_v, hide):
    keys = values = None
    outputs = []
    for x in chunks:
        keys, values = _join(keys, x @ w_k), _join(values, x @ w_v)
        outputs.append(_attend(x @ w_q, keys, values, hide(len(x), len(keys))))
    return outputs


@misconception(
    "cached_attention",
    "Within a chunk tokens see later ones. A single token needs no mask, a chunk does.",
    see=KEPT,
)
def forgets_the_mask_in_a_chunk(chunks, w_q, w_k, w_v):
    return _cached(chunks, w_q, w_k, w_v, lambda new, total: None)


@misconception(
    "cached_attention",
    "Your mask is aligned at the top left: the first token of a later chunk sees the first key "
    "alone. With a cache the queries are the last rows: query i sees the keys up to past + i.",
    see=KEPT,
)
def aligns_the_mask_at_the_top_left(chunks, w_q, w_k, w_v):
    return _cached(chunks, w_q, w_k, w_v, lambda new, total: _later(new, total, 0))


@misconception(
    "cached_attention",
    "Each chunk attends to itself alone: what came before is not asked. Join the cached keys and "
    "values with the new ones.",
    see=KEPT,
)
def forgets_the_past(chunks, w_q, w_k, w_v):
    return [_attend(x @ w_q, x @ w_k, x @ w_v, _later(len(x), len(x), 0)) for x in chunks]


@misconception(
    "cached_attention",
    "A new token does not see itself: you attend before its key and value are in the cache.",
    see=KEPT,
)
def attends_before_it_appends(chunks, w_q, w_k, w_v):
    keys = values = None
    outputs = []
    for x in chunks:
        k, v = x @ w_k, x @ w_v
        past = 0 if keys is None else len(keys)
        if past:
            outputs.append(_attend(x @ w_q, keys, values))
        else:
            outputs.append(_attend(x @ w_q, k, v, _later(len(x), len(x), 0)))
        keys, values = _join(keys, k), _join(values, v)
    return outputs


@misconception(
    "cached_attention",
    "The scores are not divided by sqrt(d): the softmax is sharper than it should be.",
    see=KEPT,
)
def forgets_the_scale(chunks, w_q, w_k, w_v):
    sharp = w_q * math.sqrt(w_q.shape[1])
    return _cached(chunks, sharp, w_k, w_v, lambda n, total: _later(n, total, total - n))


@misconception(
    "cached_attention",
    "Each token sees the one behind it as well: hide key j from query i where j > past + i.",
    see=KEPT,
)
def shows_the_next_token(chunks, w_q, w_k, w_v):
    return _cached(chunks, w_q, w_k, w_v, lambda new, total: _later(new, total, total - new + 1))


@alternative("cached_attention")
def fills_a_buffer(chunks, w_q, w_k, w_v):
    total, start, outputs = sum(map(len, chunks)), 0, []
    keys, values = (w.new_empty(total, w.shape[1]) for w in (w_k, w_v))
    for x in chunks:
        end = start + len(x)
        torch.mm(x, w_k, out=keys[start:end])
        values[start:end] = torch.einsum("td,de->te", x, w_v)
        q = F.linear(x, w_q.T.contiguous())
        outputs.append(_attend(q, keys[:end], values[:end], _later(len(x), end, start)))
        start = end
    return outputs


@alternative("cached_attention")
def token_by_token(chunks, w_q, w_k, w_v):
    keys, values, outputs = [], [], []
    for x in chunks:
        rows = []
        for q, k, v in (x @ torch.cat((w_q, w_k, w_v), 1)).unflatten(1, (3, -1)):
            keys.append(k)
            values.append(v)
            weights = (torch.stack(keys) @ q / len(q) ** 0.5).softmax(0)
            rows.append((weights[:, None] * torch.stack(values)).sum(0))
        outputs.append(torch.stack(rows))
    return outputs


# rotary_scores


def _rotate(x, positions):
    half = x.shape[1] // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 1)


def _scores(queries, keys, step):
    """step(q, k, cached, past) gives the rotated queries, what is cached, what is attended to."""
    cached, past, scores = None, 0, []
    for q, k in zip(queries, keys, strict=True):
        q, cached, seen = step(q, k, cached, past)
        past += len(k)
        scores.append(q @ seen.T / math.sqrt(q.shape[1]))
    return scores


@misconception(
    "rotary_scores",
    "Look at what is different in the second chunk: which place has its first token in the text?",
    see=POSITIONS,
    is_starter=True,
)
def restarts_the_positions(queries, keys):
    def step(q, k, cached, past):
        positions = torch.arange(len(k))
        cached = _join(cached, _rotate(k, positions))
        return _rotate(q, positions), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "The cached keys are rotated again at each step, so that old keys turn further and further. "
    "They were rotated when they were made: only new ones are.",
    see=POSITIONS,
)
def rotates_the_cache_again(queries, keys):
    def step(q, k, cached, past):
        joined = _join(cached, k)
        turned = _rotate(joined, torch.arange(len(joined)))
        return _rotate(q, torch.arange(past, past + len(q))), turned, turned

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "New keys are cached at position 0, that is, not rotated. Each key carries the position at "
    "which it stands, from then on.",
    see=POSITIONS,
)
def caches_keys_at_position_zero(queries, keys):
    def step(q, k, cached, past):
        positions = torch.arange(past, past + len(k))
        cached = _join(cached, k if past else _rotate(k, positions))
        return _rotate(q, positions), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "No key is rotated, only queries. A score must depend on the distance between the two.",
    see=POSITIONS,
)
def rotates_queries_alone(queries, keys):
    def step(q, k, cached, past):
        cached = _join(cached, k)
        return _rotate(q, torch.arange(past, past + len(q))), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "You count calls, not tokens: after a prompt of five tokens the next one stands at 5, not at "
    "1.",
    see=POSITIONS,
)
def counts_calls(queries, keys):
    calls = []

    def step(q, k, cached, past):
        positions = torch.arange(len(k)) + len(calls)
        calls.append(1)
        cached = _join(cached, _rotate(k, positions))
        return _rotate(q, positions), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "After the prompt the positions are one too far: the first new token stands at the number of "
    "cached tokens, for positions begin at 0.",
    see=POSITIONS,
)
def is_one_position_ahead(queries, keys):
    def step(q, k, cached, past):
        positions = torch.arange(past, past + len(k)) + (past > 0)
        cached = _join(cached, _rotate(k, positions))
        return _rotate(q, positions), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "Keys go on where the cache ends, queries begin at 0 again. A token's query and key stand at "
    "the same place.",
    see=POSITIONS,
)
def restarts_the_queries(queries, keys):
    def step(q, k, cached, past):
        cached = _join(cached, _rotate(k, torch.arange(past, past + len(k))))
        return _rotate(q, torch.arange(len(q))), cached, cached

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "All keys are rotated at the newest position. Each keeps its own: the score depends on how far "
    "the two are apart.",
    see=POSITIONS,
)
def rotates_all_keys_at_the_newest(queries, keys):
    def step(q, k, cached, past):
        cached = _join(cached, k)
        newest = torch.full((len(cached),), len(cached) - 1)
        return _rotate(q, torch.arange(past, past + len(q))), cached, _rotate(cached, newest)

    return _scores(queries, keys, step)


@misconception(
    "rotary_scores",
    "The scores are not divided by sqrt(d).",
    see=POSITIONS,
)
def forgets_to_scale_the_scores(queries, keys):
    root = math.sqrt(queries[0].shape[1])
    return [s * root for s in rotates_all_keys_first(queries, keys)]


@alternative("rotary_scores")
def rotates_all_keys_first(queries, keys):
    sizes = [len(k) for k in keys]
    positions = torch.arange(sum(sizes))
    k, q = _rotate(torch.cat(keys), positions), _rotate(torch.cat(queries), positions)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        part @ k[:end].T / math.sqrt(k.shape[1])
        for part, end in zip(q.split(sizes), ends, strict=True)
    ]


@alternative("rotary_scores")
def keeps_keys_bare_and_rotates_on_reading(queries, keys):
    def step(q, k, cached, past):
        cached = _join(cached, k)
        seen = _rotate(cached, torch.arange(len(cached)))
        return _rotate(q, torch.arange(past, past + len(q))), cached, seen

    return _scores(queries, keys, step)


# prefill_batch


def _batch(prompts, pad_id, *, is_left=True, positions=None, mask=None):
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(p) for p in prompts])[:, None]
    rows = [[pad_id] * (longest - len(p)) + p for p in prompts]
    columns = torch.arange(longest)
    is_token = columns >= padding
    counted = (columns - padding).clamp(min=0)
    if not is_left:
        rows = [p + [pad_id] * (longest - len(p)) for p in prompts]
        is_token = columns < longest - padding
        counted = columns.expand(len(prompts), -1) * is_token
    tokens = torch.tensor(rows)
    causal = columns <= columns[:, None]
    seen = causal & is_token[:, None, :] & is_token[:, :, None]
    return {
        "tokens": tokens,
        "positions": counted if positions is None else positions(tokens, padding, columns),
        "mask": seen if mask is None else mask(tokens, causal, is_token),
    }


@misconception(
    "prefill_batch",
    "You pad at the right: then the rows end in different columns, and the next token of a short "
    "prompt stands behind its padding. For generation the padding goes to the left.",
    see=RAGGED,
)
def pads_at_the_right(prompts, pad_id):
    return _batch(prompts, pad_id, is_left=False)


@misconception(
    "prefill_batch",
    "Your positions are columns: they count the padding. A prompt's first token is at 0.",
    see=RAGGED,
)
def positions_are_columns(prompts, pad_id):
    return _batch(
        prompts, pad_id, positions=lambda t, padding, columns: columns.expand_as(t).contiguous()
    )


@misconception(
    "prefill_batch",
    "Positions are one too high: the first token of a prompt is at 0, not at 1.",
    see=RAGGED,
)
def positions_begin_at_one(prompts, pad_id):
    return _batch(
        prompts, pad_id, positions=lambda t, padding, columns: (columns - padding + 1).clamp(min=0)
    )


@misconception(
    "prefill_batch",
    "The padding can be seen: the mask is causal and nothing else. A padding key has a score like "
    "any other.",
    see=RAGGED,
)
def shows_the_padding(prompts, pad_id):
    return _batch(
        prompts, pad_id, mask=lambda t, causal, real: causal.expand(len(t), -1, -1).contiguous()
    )


@misconception(
    "prefill_batch",
    "The padding is hidden, the future is not: a prompt's tokens see those behind them.",
    see=RAGGED,
)
def shows_the_future(prompts, pad_id):
    return _batch(prompts, pad_id, mask=lambda t, causal, real: real[:, None, :] & real[:, :, None])


@misconception(
    "prefill_batch",
    "You find the padding by its id. Many models have no id of its own for it, and a real token "
    "with that id is hidden then: go by the lengths.",
    see=RAGGED,
)
def finds_the_padding_by_its_id(prompts, pad_id):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    real = tokens != pad_id
    columns = torch.arange(longest)
    return {
        "tokens": tokens,
        "positions": (real.cumsum(1) - 1).clamp(min=0),
        "mask": (columns <= columns[:, None]) & real[:, None, :] & real[:, :, None],
    }


@misconception(
    "prefill_batch",
    "Padding is hidden as a key and still asks as a query. Its row must be empty here.",
    see=RAGGED,
)
def lets_the_padding_ask(prompts, pad_id):
    def mask(tokens, causal, real):
        alone = torch.eye(tokens.shape[1], dtype=torch.bool) & ~real[:, :, None]
        return (causal & real[:, None, :]) | alone

    return _batch(prompts, pad_id, mask=mask)


@misconception(
    "prefill_batch",
    "Positions of the padding are negative. Nobody looks at them, but a table of positions has no "
    "such row: here they are 0.",
    see=RAGGED,
)
def gives_the_padding_negative_positions(prompts, pad_id):
    return _batch(prompts, pad_id, positions=lambda t, padding, columns: columns - padding)


@misconception(
    "prefill_batch",
    "Queries and keys are swapped in the mask: a row of [b, i, j] is a query, and it sees the keys "
    "j <= i.",
    see=RAGGED,
)
def swaps_queries_and_keys(prompts, pad_id):
    batch = _batch(prompts, pad_id)
    return batch | {"mask": batch["mask"].mT.contiguous()}


@misconception(
    "prefill_batch",
    "Your mask says what is hidden. Here True means that the key is seen.",
    see=RAGGED,
)
def inverts_the_mask(prompts, pad_id):
    batch = _batch(prompts, pad_id)
    return batch | {"mask": ~batch["mask"]}


@alternative("prefill_batch")
def with_loops(prompts, pad_id):
    longest, rows = max(len(p) for p in prompts), len(prompts)
    tokens = torch.full((rows, longest), pad_id)
    positions, mask = torch.zeros_like(tokens), torch.zeros(rows, longest, longest).bool()
    for b, prompt in enumerate(prompts):
        start = longest - len(prompt)
        tokens[b, start:] = torch.tensor(prompt)
        positions[b, start:] = torch.arange(len(prompt))
        mask[b, start:, start:] = torch.ones(len(prompt), len(prompt)).tril().bool()
    return {"tokens": tokens, "positions": positions, "mask": mask}


@alternative("prefill_batch")
def with_a_flipped_pad_sequence(prompts, pad_id):
    flipped = [torch.tensor(p[::-1]) for p in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(flipped, True, pad_id).flip(1)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in flipped], True).flip(1)
    pairs = torch.einsum("bi,bj->bij", real, real)
    return {
        "tokens": tokens,
        "positions": (real.cumsum(1) - 1).clamp(min=0),
        "mask": pairs.tril().bool(),
    }


# static_step


def _static(keys, values, lengths, q, k, v, *, place=None, weigh=None, empty=None):
    rows, columns = torch.arange(len(q)), torch.arange(keys.shape[1])
    keys, values = keys.clone(), values.clone()
    where = lengths if place is None else place(lengths)
    keys[rows, where], values[rows, where] = k, v
    scores = (keys @ q[:, :, None])[..., 0] / math.sqrt(q.shape[1])
    is_empty = columns > lengths[:, None] if empty is None else empty(keys, lengths, columns)
    if weigh is None:
        weights = scores.masked_fill(is_empty, -torch.inf).softmax(-1)
    else:
        weights = weigh(scores, is_empty)
    return (weights[:, :, None] * values).sum(1), keys, values


@misconception(
    "static_step",
    "The whole buffer is attended to. A row of zeros is a key with score 0, and exp(0) is 1: it "
    "takes weight from the real ones. Hide what was not written.",
    see=STATIC,
)
def attends_to_empty_rows(keys, values, lengths, q, k, v):
    return _static(
        keys, values, lengths, q, k, v, empty=lambda k, n, c: torch.zeros(k.shape[:2]).bool()
    )


@misconception(
    "static_step",
    "You multiply the scores of empty rows by 0. A score of 0 still has weight exp(0) = 1: it must "
    "be -inf.",
    see=STATIC,
)
def sets_scores_to_zero(keys, values, lengths, q, k, v):
    return _static(
        keys, values, lengths, q, k, v,
        weigh=lambda s, is_empty: s.masked_fill(is_empty, 0.0).softmax(-1),
    )  # fmt: skip


@misconception(
    "static_step",
    "You set the weights of empty rows to 0 after the softmax, and the rest no longer adds up to "
    "1. Hide the scores before it.",
    see=STATIC,
)
def hides_after_the_softmax(keys, values, lengths, q, k, v):
    return _static(
        keys, values, lengths, q, k, v,
        weigh=lambda s, is_empty: s.softmax(-1).masked_fill(is_empty, 0.0),
    )  # fmt: skip


@misconception(
    "static_step",
    "You take zeros for empty. A real key may be zero, and an empty row may hold what an earlier "
    "text left: go by the lengths.",
    see=STATIC,
)
def goes_by_the_values(keys, values, lengths, q, k, v):
    return _static(keys, values, lengths, q, k, v, empty=lambda keys, n, c: (keys == 0).all(-1))


@misconception(
    "static_step",
    "The new token does not see itself: it is hidden with the empty rows. Hide what lies behind "
    "it, m > lengths[b].",
    see=STATIC,
)
def hides_the_new_token(keys, values, lengths, q, k, v):
    return _static(
        keys, values, lengths, q, k, v,
        weigh=lambda s, e: s.masked_fill(e, -torch.inf).softmax(-1).nan_to_num(0.0),
        empty=lambda keys, n, c: c >= n[:, None],
    )  # fmt: skip


@misconception(
    "static_step",
    "You write over the last token: the first free row is lengths[b], not lengths[b] - 1.",
    see=STATIC,
)
def writes_over_the_last_token(keys, values, lengths, q, k, v):
    return _static(
        keys, values, lengths, q, k, v,
        place=lambda n: (n - 1).clamp(min=0),
        empty=lambda keys, n, c: c > (n - 1).clamp(min=0)[:, None],
    )  # fmt: skip


@misconception(
    "static_step",
    "All rows are written and read at the longest row's length. Each row has its own.",
    see=STATIC,
)
def uses_one_length_for_all(keys, values, lengths, q, k, v):
    longest = lengths.max().expand_as(lengths)
    return _static(keys, values, longest, q, k, v)


@misconception(
    "static_step",
    "The scores are not divided by sqrt(d).",
    see=STATIC,
)
def leaves_the_scores_unscaled(keys, values, lengths, q, k, v):
    return _static(keys, values, lengths, q * math.sqrt(q.shape[1]), k, v)


@alternative("static_step")
def row_by_row(keys, values, lengths, q, k, v):
    keys, values, outputs = keys.clone(), values.clone(), []
    for b, n in enumerate(lengths.tolist()):
        keys[b, n], values[b, n] = k[b], v[b]
        weights = torch.softmax(keys[b, : n + 1] @ q[b] / q.shape[1] ** 0.5, 0)
        outputs.append(weights @ values[b, : n + 1])
    return torch.stack(outputs), keys, values


@alternative("static_step")
def with_scatter_and_sdpa(keys, values, lengths, q, k, v):
    index = lengths[:, None, None].expand(-1, 1, q.shape[1])
    keys, values = keys.scatter(1, index, k[:, None]), values.scatter(1, index, v[:, None])
    mask = (torch.arange(keys.shape[1]) <= lengths[:, None])[:, None]
    return F.scaled_dot_product_attention(q[:, None], keys, values, mask)[:, 0], keys, values


# ring_positions


@misconception(
    "ring_positions",
    "You give the last positions in order. A ring is not in order once it has rolled: the newest "
    "token lies where the oldest was.",
    see=ROLLING,
)
def keeps_the_window_in_order(num_tokens, window):
    return list(range(max(0, num_tokens - window), num_tokens))


@misconception(
    "ring_positions",
    "These are the first tokens: nothing was written over. From the window on, each new token "
    "takes the slot of the oldest.",
    see=ROLLING,
)
def never_writes_over(num_tokens, window):
    return list(range(min(num_tokens, window)))


@misconception(
    "ring_positions",
    "You end one position too late: the last of num_tokens tokens is at num_tokens - 1.",
    see=ROLLING,
)
def takes_the_count_for_the_last(num_tokens, window):
    held = min(num_tokens, window)
    return [num_tokens - (num_tokens - slot) % window for slot in range(held)]


@misconception(
    "ring_positions",
    "You give slots where positions are asked for: p mod window says where a token lies, not "
    "which.",
    see=ROLLING,
)
def gives_the_slots(num_tokens, window):
    first = max(0, num_tokens - window)
    return [position % window for position in range(first, num_tokens)]


@misconception(
    "ring_positions",
    "Every slot is counted as if its lap were full: slots behind the newest token still hold the "
    "lap before.",
    see=ROLLING,
)
def counts_whole_laps(num_tokens, window):
    lap = max(0, num_tokens - 1) // window * window
    return [lap + slot for slot in range(min(num_tokens, window))]


@misconception(
    "ring_positions",
    "A ring that is not yet full has empty slots: they hold no position.",
    see=ROLLING,
)
def counts_empty_slots(num_tokens, window):
    last = num_tokens - 1
    return [last - (last - slot) % window for slot in range(window)]


@misconception(
    "ring_positions",
    "You list the newest first. The list goes by slots: slot 0, slot 1, ...",
    see=ROLLING,
)
def lists_the_newest_first(num_tokens, window):
    return list(range(max(0, num_tokens - window), num_tokens))[::-1]


@misconception(
    "ring_positions",
    "The window is turned the wrong way: the oldest token lies behind the newest, not in slot 0.",
    see=ROLLING,
)
def turns_the_wrong_way(num_tokens, window):
    held, cut = keeps_the_window_in_order(num_tokens, window), num_tokens % window
    return held if num_tokens <= window else held[cut:] + held[:cut]


@alternative("ring_positions")
def sorts_the_window_by_slot(num_tokens, window):
    held = range(max(0, num_tokens - window), num_tokens)
    return sorted(held, key=lambda position: position % window)


@alternative("ring_positions")
def rotates_the_window(num_tokens, window):
    if num_tokens <= window:
        return list(range(num_tokens))
    ordered, cut = list(range(num_tokens - window, num_tokens)), num_tokens % window
    return ordered[window - cut :] + ordered[: window - cut]


# paged_memory


class _Blocks:
    """A right answer in another form, with a method for each thing that people get wrong."""

    def __init__(self, num_blocks, block_size):
        self.size, self.tables, self.tokens = block_size, {}, {}
        self.free = set(range(num_blocks))

    def holders(self, block):
        return sum(block in table for table in self.tables.values())

    def needed(self, num_tokens):
        return -(-num_tokens // self.size)

    def take(self, count):
        taken = sorted(self.free)[:count]
        self.free -= set(taken)
        return taken

    def allocate(self, name, num_tokens):
        if self.needed(num_tokens) > len(self.free):
            return False, None
        self.tables[name], self.tokens[name] = self.take(self.needed(num_tokens)), num_tokens
        return True, None

    def is_copied(self, name):
        return self.tokens[name] % self.size > 0 and self.holders(self.tables[name][-1]) > 1

    def grows(self, name):
        return self.tokens[name] % self.size == 0

    def append(self, name):
        is_copied, copy = self.is_copied(name), None
        if is_copied or self.grows(name):
            if not self.free:
                return False, None
            (block,) = self.take(1)
            if is_copied:
                source = self.tables[name].pop()
                copy = (source, block)
                self.release(source)
            self.tables[name].append(block)
        self.tokens[name] += 1
        return True, copy

    def release(self, block):
        if not self.holders(block):
            self.free.add(block)

    def fork(self, name, child):
        self.tables[child], self.tokens[child] = list(self.tables[name]), self.tokens[name]
        return True, None

    def remove(self, name):
        table = self.tables.pop(name)
        del self.tokens[name]
        for block in table:
            self.release(block)
        return True, None

    def state(self, copy, done):
        tables = {name: list(table) for name, table in self.tables.items()}
        return {"tables": tables, "num_free": len(self.free), "copy": copy, "done": done}

    def play(self, operations):
        states = []
        for operation, *rest in operations:
            done, copy = getattr(self, "remove" if operation == "free" else operation)(*rest)
            states.append(self.state(copy, done))
        return states


@alternative("paged_memory")
def counts_holders_in_the_tables(num_blocks, block_size, operations):
    return _Blocks(num_blocks, block_size).play(operations)


@alternative("paged_memory")
def with_reference_counts_and_a_sorted_list(num_blocks, block_size, operations):
    counts, tables, tokens, states = [0] * num_blocks, {}, {}, []

    def first_free():
        return counts.index(0)

    for operation, name, *rest in operations:
        copy, done, num_free = None, True, counts.count(0)
        if operation == "allocate":
            done = (rest[0] + block_size - 1) // block_size <= num_free
            if done:
                tables[name], tokens[name] = [], rest[0]
                for _ in range(0, rest[0], block_size):
                    tables[name].append(first_free())
                    counts[tables[name][-1]] = 1
        elif operation == "append":
            slot, last = tokens[name] % block_size, tables[name][-1]
            needs_block = slot == 0 or counts[last] > 1
            done = not needs_block or num_free > 0
            if done and needs_block:
                block = first_free()
                counts[block] = 1
                if slot == 0:
                    tables[name].append(block)
                else:
                    tables[name][-1], copy = block, (last, block)
                    counts[last] -= 1
            tokens[name] += int(done)
        elif operation == "fork":
            tables[rest[0]], tokens[rest[0]] = tables[name][:], tokens[name]
            for block in tables[name]:
                counts[block] += 1
        elif operation == "free":
            for block in tables.pop(name):
                counts[block] -= 1
        shown = {key: table[:] for key, table in tables.items()}
        states.append({"tables": shown, "num_free": counts.count(0), "copy": copy, "done": done})
    return states


@misconception(
    "paged_memory",
    "Blocks are leaked: a sequence that ends gives none back. Whatever its table names and nobody "
    "else does is free again.",
    see=PAGES,
)
def leaks_blocks(num_blocks, block_size, operations):
    class Leaks(_Blocks):
        def remove(self, name):
            del self.tables[name], self.tokens[name]
            return True, None

    return Leaks(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "You give back all blocks of a sequence, those too that others still hold: they will be handed "
    "out a second time. Count the holders.",
    see=PAGES,
)
def frees_shared_blocks(num_blocks, block_size, operations):
    class Frees(_Blocks):
        def remove(self, name):
            self.free |= set(self.tables.pop(name))
            del self.tokens[name]
            return True, None

    return Frees(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "A shared block is written to in place: the other sequence's tokens change. Who writes to a "
    "block that others hold as well gets a copy first.",
    see=PAGES,
)
def writes_to_shared_blocks(num_blocks, block_size, operations):
    class Writes(_Blocks):
        def is_copied(self, name):
            return False

    return Writes(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "You copy all blocks at the fork. That takes the room of two sequences at once: share them, "
    "and copy the one that is written to.",
    see=PAGES,
)
def copies_at_the_fork(num_blocks, block_size, operations):
    class Copies(_Blocks):
        def fork(self, name, child):
            if len(self.tables[name]) > len(self.free):
                return False, None
            self.tables[child] = self.take(len(self.tables[name]))
            self.tokens[child] = self.tokens[name]
            return True, None

        def append(self, name):
            return super().append(name) if name in self.tables else (False, None)

        def remove(self, name):
            return super().remove(name) if name in self.tables else (False, None)

    return Copies(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "The last holder of a block copies it as well. Nobody else reads it any more: it may be "
    "written to in place.",
    see=PAGES,
)
def copies_for_the_last_holder(num_blocks, block_size, operations):
    class Copies(_Blocks):
        was_shared: frozenset = frozenset()

        def fork(self, name, child):
            self.was_shared = self.was_shared | set(self.tables[name])
            return super().fork(name, child)

        def is_copied(self, name):
            is_open = self.tokens[name] % self.size > 0
            return is_open and self.tables[name][-1] in self.was_shared

        def take(self, count):
            taken = super().take(count)
            self.was_shared = self.was_shared - set(taken)
            return taken

    return Copies(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "The copy is reported the wrong way round: from the shared block to the new one.",
    see=PAGES,
)
def copies_backwards(num_blocks, block_size, operations):
    class Backwards(_Blocks):
        def state(self, copy, done):
            return super().state(copy and copy[::-1], done)

    return Backwards(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "Your fork only copies the list, and nobody counts: shared blocks are written to in place, and "
    "freed by the first who leaves.",
    see=PAGES,
)
def forks_without_counting(num_blocks, block_size, operations):
    class Careless(_Blocks):
        def is_copied(self, name):
            return False

        def remove(self, name):
            self.free |= set(self.tables.pop(name))
            del self.tokens[name]
            return True, None

    return Careless(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "A shared block that is full is copied though nothing is written to it: the token goes to a "
    "new block.",
    see=PAGES,
)
def copies_full_blocks(num_blocks, block_size, operations):
    class Copies(_Blocks):
        def append(self, name):
            if self.grows(name) and self.holders(self.tables[name][-1]) > 1:
                if len(self.free) < 2:
                    return False, None
                own, block = self.take(2)
                source = self.tables[name].pop()
                self.release(source)
                self.tables[name] += [own, block]
                self.tokens[name] += 1
                return True, (source, own)
            return super().append(name)

    return Copies(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "A sequence whose tokens just fill its blocks gets one block too many. It needs "
    "ceil(tokens / block_size), not one more.",
    see=PAGES,
)
def takes_a_block_ahead(num_blocks, block_size, operations):
    class Ahead(_Blocks):
        def needed(self, num_tokens):
            return num_tokens // self.size + 1

        def grows(self, name):
            return (self.tokens[name] + 1) % self.size == 0

    return Ahead(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "Where too few blocks are free you take those that there are, and they are lost. See first "
    "whether they suffice.",
    see=PAGES,
)
def keeps_what_it_took_in_vain(num_blocks, block_size, operations):
    class Keeps(_Blocks):
        def allocate(self, name, num_tokens):
            if self.needed(num_tokens) > len(self.free):
                self.free.clear()
                return False, None
            return super().allocate(name, num_tokens)

    return Keeps(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "You hand out the block that was freed last, as from a stack. That works as well, but here it "
    "is to be the free one with the smallest number.",
    see=PAGES,
)
def hands_out_the_last_freed(num_blocks, block_size, operations):
    class Stack(_Blocks):
        def __init__(self, num_blocks, block_size):
            super().__init__(num_blocks, block_size)
            self.stack = list(range(num_blocks))[::-1]

        def take(self, count):
            taken = [self.stack.pop() for _ in range(count)]
            self.free -= set(taken)
            return taken

        def release(self, block):
            if not self.holders(block):
                self.stack.append(block)
            super().release(block)

    return Stack(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "A token is appended without room: where no block is free, nothing must change, the length "
    "neither.",
    see=PAGES,
)
def counts_a_token_without_room(num_blocks, block_size, operations):
    class Counts(_Blocks):
        def append(self, name):
            done, copy = super().append(name)
            self.tokens[name] += not done
            return done, copy

    return Counts(num_blocks, block_size).play(operations)


@misconception(
    "paged_memory",
    "Each state holds the same lists, which change later on: copy the tables when you report them.",
    see=PAGES,
)
def reports_live_tables(num_blocks, block_size, operations):
    class Live(_Blocks):
        def state(self, copy, done):
            return super().state(copy, done) | {"tables": self.tables}

    return Live(num_blocks, block_size).play(operations)


# serving_iterations


def _served(lengths, max_batch, static=None, continuous=None):
    batches = [lengths[i : i + max_batch] for i in range(0, len(lengths), max_batch)]
    static = sum(map(max, batches)) if static is None else static
    if continuous is None:
        continuous = _continuous(lengths, max_batch)
    total = sum(lengths)
    return {
        "static": static,
        "continuous": continuous,
        "static_use": total / (static * max_batch),
        "continuous_use": total / (continuous * max_batch),
    }


def _continuous(lengths, max_batch, pause=0):
    places = [0] * max_batch
    for length in lengths:
        start = heapq.heappop(places)
        heapq.heappush(places, start + length + (pause if start else 0))
    return max(places)


@misconception(
    "serving_iterations",
    "You divide the tokens by the places. At the end the last requests run alone, so that it takes "
    "longer.",
    see=SERVING,
)
def divides_the_tokens(output_lengths, max_batch):
    ideal = math.ceil(sum(output_lengths) / max_batch)
    return _served(output_lengths, max_batch, continuous=ideal)


@misconception(
    "serving_iterations",
    "You serve the longest answers first. Nobody knows them in advance: requests are served in the "
    "order of arrival.",
    see=SERVING,
)
def serves_the_longest_first(output_lengths, max_batch):
    return _served(sorted(output_lengths, reverse=True), max_batch)


@misconception(
    "serving_iterations",
    "A place stays empty for one iteration after each request. What is done leaves at the end of "
    "an iteration, and who waits is there in the next.",
    see=SERVING,
)
def loses_an_iteration_at_each_change(output_lengths, max_batch):
    slow = _continuous(output_lengths, max_batch, pause=1)
    return _served(output_lengths, max_batch, continuous=slow)


@misconception(
    "serving_iterations",
    "You let a static batch take as long as all of its answers together. They run side by side: "
    "the longest counts.",
    see=SERVING,
)
def adds_up_a_batch(output_lengths, max_batch):
    return _served(output_lengths, max_batch, static=sum(output_lengths))


@misconception(
    "serving_iterations",
    "You let a static batch end with its average answer. It ends with the longest.",
    see=SERVING,
)
def averages_a_batch(output_lengths, max_batch):
    batches = [output_lengths[i : i + max_batch] for i in range(0, len(output_lengths), max_batch)]
    average = sum(math.ceil(sum(batch) / len(batch)) for batch in batches)
    return _served(output_lengths, max_batch, static=average)


@misconception(
    "serving_iterations",
    "You gave each place its requests in advance, in turns. A place that is free earlier takes the "
    "next request, whichever that is.",
    see=SERVING,
)
def deals_the_requests_out(output_lengths, max_batch):
    longest = max(sum(output_lengths[place::max_batch]) for place in range(max_batch))
    return _served(output_lengths, max_batch, continuous=longest)


@misconception(
    "serving_iterations",
    "You take in new requests only when all places are free: that is static batching once more.",
    see=SERVING,
)
def waits_for_all_places(output_lengths, max_batch):
    batches = range(0, len(output_lengths), max_batch)
    slow = sum(max(output_lengths[i : i + max_batch]) for i in batches)
    return _served(output_lengths, max_batch, continuous=slow)


@misconception(
    "serving_iterations",
    "You divide places by tokens. How full they are is tokens over places, at most 1.",
    see=SERVING,
)
def divides_places_by_tokens(output_lengths, max_batch):
    right = _served(output_lengths, max_batch)
    return right | {key: 1 / right[key] for key in ("static_use", "continuous_use")}


@alternative("serving_iterations")
def iteration_by_iteration(output_lengths, max_batch):
    waiting, running, count = list(output_lengths), [], 0
    while waiting or running:
        room = max_batch - len(running)
        running, waiting = running + waiting[:room], waiting[room:]
        running = [left - 1 for left in running if left > 1]
        count += 1
    return _served(output_lengths, max_batch, continuous=count)


@alternative("serving_iterations")
def with_a_list_of_places(output_lengths, max_batch):
    free_from = [0 for _ in range(max_batch)]
    for length in output_lengths:
        place = free_from.index(min(free_from))
        free_from[place] += length
    return _served(output_lengths, max_batch, continuous=max(free_from))


# serving_memory


def _memory(token_bytes, free, max_len, tokens, block, paged=None):
    blocks = free // (block * token_bytes)
    return {
        "token_bytes": token_bytes,
        "reserved": free // (max_len * token_bytes),
        "paged": blocks // -(-tokens // block) if paged is None else paged(blocks),
    }


@misconception(
    "serving_memory",
    "You count queries as well. Nobody asks for an old query again: keys and values are kept.",
    see=BYTES,
)
def counts_queries(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    per_token = layers * (heads + 2 * kv_heads) * width * bits // 8
    return _memory(per_token, free, max_len, tokens, block)


@misconception(
    "serving_memory",
    "You count one tensor. Keys and values are two.",
    see=BYTES,
)
def counts_one_tensor(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    return _memory(layers * kv_heads * width * bits // 8, free, max_len, tokens, block)


@misconception(
    "serving_memory",
    "You count the query heads. With grouped heads only the key/value heads are kept.",
    see=BYTES,
)
def counts_query_heads(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    return _memory(2 * layers * heads * width * bits // 8, free, max_len, tokens, block)


@misconception(
    "serving_memory",
    "You take bits for bytes: 16 bits are 2 bytes.",
    see=BYTES,
)
def takes_bits_for_bytes(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    return _memory(2 * layers * kv_heads * width * bits, free, max_len, tokens, block)


@misconception(
    "serving_memory",
    "That is the cache of one layer. Every layer has its own keys and values.",
    see=BYTES,
)
def counts_one_layer(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    return _memory(2 * kv_heads * width * bits // 8, free, max_len, tokens, block)


@misconception(
    "serving_memory",
    "You divide by the tokens themselves. A sequence holds whole blocks: round up.",
    see=BYTES,
)
def shares_blocks_between_sequences(
    layers, heads, kv_heads, width, bits, free, max_len, tokens, block
):
    per_token = 2 * layers * kv_heads * width * bits // 8
    return _memory(per_token, free, max_len, tokens, block, lambda blocks: blocks * block // tokens)


@alternative("serving_memory")
def counts_bits(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    per_token = layers * 2 * (kv_heads * width) * bits // 8
    sequence = ((tokens - 1) // block + 1) * block * per_token
    blocks = free // (per_token * block)
    return {
        "token_bytes": per_token,
        "reserved": int(free // (max_len * per_token)),
        "paged": blocks * block * per_token // sequence,
    }


@alternative("serving_memory")
def adds_layers_up(layers, heads, kv_heads, width, bits, free, max_len, tokens, block):
    per_token = sum(2 * kv_heads * width * bits for _ in range(layers)) // 8
    return _memory(per_token, free, max_len, tokens, block)


# generation_flops


def _flops(prompt, new, layers, attention, mlp, width, step=None, training=None):
    weights, pair = layers * 2 * (attention + mlp), layers * 4 * width

    def whole(n):
        return n * weights + n * (n + 1) // 2 * pair

    one = step or (lambda n: weights + n * pair)
    cached = whole(prompt) + sum(one(n) for n in range(prompt + 1, prompt + new))
    return {
        "recomputed": sum(whole(n) for n in range(prompt, prompt + new)),
        "cached": cached,
        "training": 3 * whole(prompt + new) if training is None else training(whole, cached),
    }


@misconception(
    "generation_flops",
    "You let a cache help training. There all tokens are known and go through side by side, each "
    "once: nothing is computed twice that could be kept.",
    see=COST,
)
def trains_with_a_cache(prompt, new, layers, attention, mlp, width):
    return _flops(prompt, new, layers, attention, mlp, width, training=lambda w, cached: 3 * cached)


@misconception(
    "generation_flops",
    "You leave out the MLP of the new token. The cache holds keys and values: it does not shrink "
    "the MLP, through which the new token goes as ever.",
    see=COST,
)
def skips_the_mlp(prompt, new, layers, attention, mlp, width):
    return _flops(
        prompt, new, layers, attention, mlp, width,
        step=lambda n: layers * (2 * attention + 4 * width * n),
    )  # fmt: skip


@misconception(
    "generation_flops",
    "You put all old tokens through the MLP at each step. Their keys and values are there in every "
    "layer, and nobody asks for more of them: only the new token goes through.",
    see=COST,
)
def runs_the_mlp_on_the_past(prompt, new, layers, attention, mlp, width):
    return _flops(
        prompt, new, layers, attention, mlp, width,
        step=lambda n: layers * (2 * attention + n * 2 * mlp + 4 * width * n),
    )  # fmt: skip


@misconception(
    "generation_flops",
    "You let attention cost nothing with a cache. Keys are kept, scores are not: the new query "
    "still meets each of them.",
    see=COST,
)
def forgets_the_scores(prompt, new, layers, attention, mlp, width):
    return _flops(
        prompt, new, layers, attention, mlp, width, step=lambda n: 2 * layers * (attention + mlp)
    )


@misconception(
    "generation_flops",
    "You let all old queries ask again at each step: n^2 pairs. With a cache there is one query, "
    "and n pairs.",
    see=COST,
)
def asks_all_queries_again(prompt, new, layers, attention, mlp, width):
    return _flops(
        prompt, new, layers, attention, mlp, width,
        step=lambda n: layers * (2 * (attention + mlp) + n * (n + 1) // 2 * 4 * width),
    )  # fmt: skip


@misconception(
    "generation_flops",
    "You put the last new token through as well. It is chosen, and the work ends: the prompt's "
    "pass gives the first one already.",
    see=COST,
)
def puts_the_last_token_through(prompt, new, layers, attention, mlp, width):
    right = _flops(prompt, new, layers, attention, mlp, width)
    last = layers * (2 * (attention + mlp) + 4 * width * (prompt + new))
    return right | {"cached": right["cached"] + last}


@misconception(
    "generation_flops",
    "You let each query of a pass meet every key. The mask leaves it itself and those before it.",
    see=COST,
)
def forgets_causality(prompt, new, layers, attention, mlp, width):
    def whole(n):
        return layers * (n * 2 * (attention + mlp) + n * n * 4 * width)

    later = range(prompt + 1, prompt + new)
    step = sum(layers * (2 * (attention + mlp) + 4 * width * n) for n in later)
    return {
        "recomputed": sum(whole(n) for n in range(prompt, prompt + new)),
        "cached": whole(prompt) + step,
        "training": 3 * whole(prompt + new),
    }


@misconception(
    "generation_flops",
    "You leave out the backward pass: a step of training takes three times a forward pass.",
    see=COST,
)
def trains_without_backward(prompt, new, layers, attention, mlp, width):
    return _flops(prompt, new, layers, attention, mlp, width, training=lambda w, c: w(prompt + new))


@misconception(
    "generation_flops",
    "You count multiply-adds. A product-sum is 2 FLOPs.",
    see=COST,
)
def counts_multiply_adds(prompt, new, layers, attention, mlp, width):
    right = _flops(prompt, new, layers, attention, mlp, width)
    return {key: value // 2 for key, value in right.items()}


@misconception(
    "generation_flops",
    "You leave out the prompt's pass. The cache has to be filled before it helps.",
    see=COST,
)
def forgets_the_prefill(prompt, new, layers, attention, mlp, width):
    right = _flops(prompt, new, layers, attention, mlp, width)
    pairs = prompt * (prompt + 1) // 2
    prefill = layers * (2 * prompt * (attention + mlp) + 4 * width * pairs)
    return right | {"cached": right["cached"] - prefill}


@misconception(
    "generation_flops",
    "That is one layer. There are num_layers of them.",
    see=COST,
)
def counts_a_single_layer(prompt, new, layers, attention, mlp, width):
    return _flops(prompt, new, 1, attention, mlp, width)


@alternative("generation_flops")
def token_after_token(prompt, new, layers, attention, mlp, width):
    def token(position):
        return layers * (2 * attention + 2 * mlp + 4 * width * (position + 1))

    text = [token(position) for position in range(prompt + new)]
    return {
        "recomputed": sum(sum(text[:end]) for end in range(prompt, prompt + new)),
        "cached": sum(text[: prompt + new - 1]),
        "training": 3 * sum(text),
    }


@alternative("generation_flops")
def in_closed_form(prompt, new, layers, attention, mlp, width):
    a, b = 2 * layers * (attention + mlp), 4 * layers * width
    n = prompt + new

    def triangle(m):
        return m * (m + 1) // 2

    def pyramid(m):
        return m * (m + 1) * (m + 2) // 6

    return {
        "recomputed": a * (triangle(n - 1) - triangle(prompt - 1))
        + b * (pyramid(n - 1) - pyramid(prompt - 1)),
        "cached": a * (n - 1) + b * triangle(n - 1),
        "training": 3 * (a * n + b * triangle(n)),
    }
