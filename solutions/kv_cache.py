"""Chapter 06: KV cache."""

import heapq
import math

import torch


def cached_attention(chunks, w_q, w_k, w_v):
    """Causal attention over a text that arrives in chunks; every row is projected once.

    chunks: a list of tensors (T_i, D), a prompt and then single tokens, or any other cut
    w_q, w_k, w_v: (D, d), to be used as x @ w_q    returns a list of tensors (T_i, d)

    A token attends to all tokens before it, those of earlier chunks among them, and to itself, with
    scores q k^T / sqrt(d). A row goes through w_q, w_k and w_v once each. Nothing is computed for
    earlier queries again: they were answered.
    """
    # BEGIN SOLUTION
    keys = values = None
    outputs = []
    for x in chunks:
        q, k, v = x @ w_q, x @ w_k, x @ w_v
        keys = k if keys is None else torch.cat((keys, k))
        values = v if values is None else torch.cat((values, v))
        past, new = len(keys) - len(x), len(x)
        hidden = torch.ones(new, past + new, dtype=torch.bool).triu(past + 1)
        scores = (q @ keys.T / math.sqrt(q.shape[1])).masked_fill(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ values)
    return outputs
    # END SOLUTION


def rotate(x, positions, base=10000.0):
    """Given: RoPE. x: (T, d)    positions: (T,)    returns (T, d)"""
    half = x.shape[1] // 2
    frequencies = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), 1)


def rotary_scores(queries, keys):
    """Scores of each chunk's queries against all keys so far, with rotary positions.

    queries, keys: lists of tensors (T_i, d), not yet rotated; the chunks of one text, in order
    returns a list of tensors (T_i, S_i), S_i = T_1 + ... + T_i: q k^T / sqrt(d), without a mask

    A token's position is its place in the whole text, from 0. Use `rotate` above; each query and
    each key goes through it once.

    A program that somebody wrote is below. It is right for a text in one chunk. Repair it.
    """
    # BEGIN SOLUTION
    cached, scores = None, []
    for q, k in zip(queries, keys, strict=True):
        past = 0 if cached is None else len(cached)
        positions = torch.arange(past, past + len(k))
        q, k = rotate(q, positions), rotate(k, positions)
        cached = k if cached is None else torch.cat((cached, k))
        scores.append(q @ cached.T / math.sqrt(q.shape[1]))
    return scores
    # STARTER
    # | cached, scores = None, []
    # | for q, k in zip(queries, keys, strict=True):
    # |     positions = torch.arange(len(k))
    # |     q, k = rotate(q, positions), rotate(k, positions)
    # |     cached = k if cached is None else torch.cat((cached, k))
    # |     scores.append(q @ cached.T / math.sqrt(q.shape[1]))
    # | return scores
    # END SOLUTION


def prefill_batch(prompts, pad_id):
    """Prompts of different lengths as one batch, ready for the next token.

    prompts: a list of B lists of token ids, none empty; pad_id may be among the real tokens
    returns a dict
        "tokens"      (B, T) int64, T the longest prompt: pad_id at the left, so that all prompts
                      end in the last column
        "positions"   (B, T) int64: 0 for a prompt's first token; 0 at the padding too
        "mask"        (B, T, T) bool: [b, i, j] says whether the query in column i sees the key in
                      column j; padding is seen by nobody and, as a query, sees nothing
    """
    # BEGIN SOLUTION
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    padding = torch.tensor([longest - len(p) for p in prompts])[:, None]
    columns = torch.arange(longest)
    is_token = columns >= padding
    mask = (columns <= columns[:, None]) & is_token[:, None, :] & is_token[:, :, None]
    return {"tokens": tokens, "positions": (columns - padding).clamp(min=0), "mask": mask}
    # END SOLUTION


def static_step(keys, values, lengths, q, k, v):
    """One decoding step of a batch whose cache was made with room for M tokens a row.

    keys, values: (B, M, d); row b holds lengths[b] tokens, from 0 on. What lies behind them are
    zeros, or what an earlier text left there    lengths: (B,) int64, all below M
    q, k, v: (B, d), the new token of each row
    returns (out (B, d), keys, values): the attention of each row's new token to its own tokens and
    to itself, scores q k^T / sqrt(d), and the buffers with the new token in its place

    Return new buffers; those that you are given stay as they are.
    """
    # BEGIN SOLUTION
    rows = torch.arange(len(q))
    keys, values = keys.clone(), values.clone()
    keys[rows, lengths], values[rows, lengths] = k, v
    scores = torch.einsum("bd,bmd->bm", q, keys) / math.sqrt(q.shape[1])
    is_empty = torch.arange(keys.shape[1]) > lengths[:, None]
    weights = scores.masked_fill(is_empty, -torch.inf).softmax(-1)
    return torch.einsum("bm,bmd->bd", weights, values), keys, values
    # END SOLUTION


def ring_positions(num_tokens, window):
    """Which position does each slot of a rolling cache hold?

    num_tokens >= 0 tokens, at positions 0, 1, ..., were written; the one at position p to slot
    p mod window    returns a list of ints: for each slot that holds something, in the order of the
    slots, the position that it holds

    A closed form: no loop over the tokens.
    """
    # BEGIN SOLUTION
    last = num_tokens - 1
    return [last - (last - slot) % window for slot in range(min(num_tokens, window))]
    # END SOLUTION


def paged_memory(num_blocks, block_size, operations):
    """The bookkeeping of a paged cache: who holds which blocks.

    operations: a list of
        ("allocate", name, num_tokens)   a new sequence with so many tokens, at least one
        ("append", name)                 one token more
        ("fork", name, child)            a new sequence `child` with the same tokens, in the same
                                         blocks
        ("free", name)                   the sequence is gone
    returns a list with, after each operation, a dict
        "tables"     {name: the list of its blocks, in the order of its tokens}
        "num_free"   how many blocks nobody holds
        "copy"       (from, to) where a block had to be copied, else None
        "done"       False where too few blocks were free: then nothing has changed

    Blocks are numbered from 0; whoever needs one gets the free one with the smallest number. A
    sequence holds as many blocks as its tokens fill, the last perhaps in part. An appended token is
    written: where it would go to a block that another sequence holds as well, the sequence gets a
    block of its own in that place, and the old one is copied to it.

    Source: arXiv 2309.06180, sec. 4.3 and 4.4.
    """
    # BEGIN SOLUTION
    tables, lengths, holders = {}, {}, [0] * num_blocks
    free = list(range(num_blocks))

    def take(count):
        taken = [heapq.heappop(free) for _ in range(count)]
        for block in taken:
            holders[block] = 1
        return taken

    def drop(block):
        holders[block] -= 1
        if holders[block] == 0:
            heapq.heappush(free, block)

    def append(name):
        table, slot = tables[name], lengths[name] % block_size
        is_shared = slot > 0 and holders[table[-1]] > 1
        if slot > 0 and not is_shared:
            lengths[name] += 1
            return True, None
        if not free:
            return False, None
        lengths[name] += 1
        (block,) = take(1)
        if not is_shared:
            table.append(block)
            return True, None
        source, table[-1] = table[-1], block
        drop(source)
        return True, (source, block)

    states = []
    for operation, name, *rest in operations:
        done, copy = True, None
        if operation == "allocate":
            needed = math.ceil(rest[0] / block_size)
            done = needed <= len(free)
            if done:
                tables[name], lengths[name] = take(needed), rest[0]
        elif operation == "append":
            done, copy = append(name)
        elif operation == "fork":
            tables[rest[0]], lengths[rest[0]] = list(tables[name]), lengths[name]
            for block in tables[name]:
                holders[block] += 1
        else:
            for block in tables.pop(name):
                drop(block)
        snapshot = {key: list(table) for key, table in tables.items()}
        states.append({"tables": snapshot, "num_free": len(free), "copy": copy, "done": done})
    return states
    # END SOLUTION


def serving_iterations(output_lengths, max_batch):
    """How many iterations do these requests take, and how full are they?

    output_lengths: how many tokens each request answers with, in the order of arrival; all are
    there from the start    returns a dict
        "static"           iterations of static batching: max_batch requests at a time, in order;
                           the next batch begins when the last one is done
        "continuous"       iterations of continuous batching: a place that became free in one
                           iteration is taken in the next by the request that waits first
        "static_use", "continuous_use"   tokens over places, iterations x max_batch (floats)

    In one iteration each running request gives one token. Prompts are not counted.

    Source: Orca (OSDI 2022), sec. 3.
    """
    # BEGIN SOLUTION
    batches = range(0, len(output_lengths), max_batch)
    static = sum(max(output_lengths[start : start + max_batch]) for start in batches)
    places = [0] * max_batch
    for length in output_lengths:
        heapq.heappush(places, heapq.heappop(places) + length)
    continuous, total = max(places), sum(output_lengths)
    return {
        "static": static,
        "continuous": continuous,
        "static_use": total / (static * max_batch),
        "continuous_use": total / (continuous * max_batch),
    }
    # END SOLUTION


def serving_memory(
    num_layers, num_heads, num_kv_heads, head_dim, bits, free_bytes, max_len, num_tokens, block_size
):
    """How many sequences fit into the memory that the weights leave?

    returns a dict of ints
        "token_bytes"   bytes that one token of one sequence takes in the cache
        "reserved"      sequences, if each has room for max_len tokens from the start
        "paged"         sequences, if each has num_tokens tokens in blocks of block_size

    bits: of each element    free_bytes: the memory for the cache. Blocks and sequences are whole.

    Source: arXiv 2309.06180, sec. 3.
    """
    # BEGIN SOLUTION
    token_bytes = 2 * num_layers * num_kv_heads * head_dim * bits // 8
    num_blocks = free_bytes // (block_size * token_bytes)
    return {
        "token_bytes": token_bytes,
        "reserved": free_bytes // (max_len * token_bytes),
        "paged": num_blocks // math.ceil(num_tokens / block_size),
    }
    # END SOLUTION


def generation_flops(prompt_len, num_new, num_layers, attention_weights, mlp_weights, width):
    """FLOPs of a decoder's layers, with and without a cache; embedding and head left out.

    attention_weights, mlp_weights: weights of one layer's projections and of its MLP; each takes 2
    FLOPs a token that goes through    width: H d; a query takes 4 * width FLOPs a layer for each
    key that it sees (itself and all before it)
    returns a dict of ints
        "recomputed"   num_new tokens, without a cache: for each, the whole text so far goes through
        "cached"       the same with a cache. The first new token comes out of the pass over the
                       prompt; the last one is not put through
        "training"     one training step on all prompt_len + num_new tokens at once, as fast as it
                       can be done; backward takes twice as much as forward
    """
    # BEGIN SOLUTION
    weights = num_layers * 2 * (attention_weights + mlp_weights)
    pair = num_layers * 4 * width

    def whole(length):
        return length * weights + length * (length + 1) // 2 * pair

    later = range(prompt_len + 1, prompt_len + num_new)
    return {
        "recomputed": sum(whole(prompt_len + i) for i in range(num_new)),
        "cached": whole(prompt_len) + sum(weights + length * pair for length in later),
        "training": 3 * whole(prompt_len + num_new),
    }
    # END SOLUTION
