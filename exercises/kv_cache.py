# Exercise 8361102d6996: write your answers below, and leave this line as it is.
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
    raise NotImplementedError("cached_attention: not written yet")


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
    cached, scores = None, []
    for q, k in zip(queries, keys, strict=True):
        positions = torch.arange(len(k))
        q, k = rotate(q, positions), rotate(k, positions)
        cached = k if cached is None else torch.cat((cached, k))
        scores.append(q @ cached.T / math.sqrt(q.shape[1]))
    return scores


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
    raise NotImplementedError("prefill_batch: not written yet")


def static_step(keys, values, lengths, q, k, v):
    """One decoding step of a batch whose cache was made with room for M tokens a row.

    keys, values: (B, M, d); row b holds lengths[b] tokens, from 0 on. What lies behind them are
    zeros, or what an earlier text left there    lengths: (B,) int64, all below M
    q, k, v: (B, d), the new token of each row
    returns (out (B, d), keys, values): the attention of each row's new token to its own tokens and
    to itself, scores q k^T / sqrt(d), and the buffers with the new token in its place

    Return new buffers; those that you are given stay as they are.
    """
    raise NotImplementedError("static_step: not written yet")


def ring_positions(num_tokens, window):
    """Which position does each slot of a rolling cache hold?

    num_tokens >= 0 tokens, at positions 0, 1, ..., were written; the one at position p to slot
    p mod window    returns a list of ints: for each slot that holds something, in the order of the
    slots, the position that it holds

    A closed form: no loop over the tokens.
    """
    raise NotImplementedError("ring_positions: not written yet")


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
    raise NotImplementedError("paged_memory: not written yet")


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
    raise NotImplementedError("serving_iterations: not written yet")


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
    raise NotImplementedError("serving_memory: not written yet")


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
    raise NotImplementedError("generation_flops: not written yet")
