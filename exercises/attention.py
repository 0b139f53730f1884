# Exercise b025d8bd9b83: write your answers below, and leave this line as it is.
"""Chapter 04: attention."""

import math

import torch
from torch import nn


def scaled_dot_product_attention(q, k, v, is_kept=None, dropout_rate=0.0):
    """softmax(q k^T / sqrt(d)) v, with dropout on the probabilities where `is_kept` is given.

    q: (..., T, d)    k: (..., S, d)    v: (..., S, dv)    returns (..., T, dv) in the dtype of q

    Scores of query t against every key make one row; the softmax runs along the keys. `is_kept`, if
    not None, is a boolean tensor (..., T, S), drawn by the caller: a probability that is not kept
    becomes zero, and the others are divided by 1 - dropout_rate. The rows are not normalised again.

    Use products and torch.softmax; F.scaled_dot_product_attention is the answer sheet.

    Source: Attention is all you need, arXiv 1706.03762, eq. 1; the dropout is what BERT's
    configuration calls attention_probs_dropout_prob.
    """
    raise NotImplementedError("scaled_dot_product_attention: not written yet")


def decoder_mask(is_real, num_queries, dtype):
    """The additive mask of a decoder: causal, and blind to padding.

    is_real: (B, S) boolean, False where position s of sequence b is padding
    num_queries: T <= S; the queries are the LAST T positions (the earlier ones are cached)
    returns (B, 1, T, S) of `dtype`: 0 where the query sees the key, -inf where it does not

    A query sees the keys at its own position and before it, if they are real. A query whose row has
    nothing to see, as a padded position on the left, gets a row of -inf. Every floating dtype holds
    -inf; float16 holds no number beyond 65504.
    """
    raise NotImplementedError("decoder_mask: not written yet")


def masked_softmax(scores, mask):
    """Softmax over the keys that a boolean mask leaves.

    scores: (..., T, S)    mask: boolean, broadcasts to scores, True = seen
    returns probabilities shaped as scores and of its dtype

    The probabilities of the seen keys of a row sum to one and unseen keys get exactly zero. A row
    that sees no key gets zeros, not NaN, and its scores get a gradient of zero. Any float dtype.
    """
    raise NotImplementedError("masked_softmax: not written yet")


class MultiHeadAttention(nn.Module):
    """Self-attention with `num_heads` heads of width dim / num_heads.

    Four linear maps without bias, named q_proj, k_proj, v_proj, o_proj, each dim to dim. Head h
    owns columns h * head_dim ... (h + 1) * head_dim - 1 of q_proj(x), k_proj(x) and v_proj(x), and
    of the merged result that o_proj receives. With `is_causal` position t sees 0 ... t.

    Source: arXiv 1706.03762, sec. 3.2.2.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        raise NotImplementedError("MultiHeadAttention.__init__: not written yet")

    def forward(self, x, is_causal=False):
        """x: (B, T, dim), returns (B, T, dim)."""
        raise NotImplementedError("MultiHeadAttention.forward: not written yet")


def run_multi_head_attention(x, weights, num_heads, is_causal=False):
    """Given: builds MultiHeadAttention, loads `weights` ({"q_proj": (dim, dim), ...}), calls it."""
    layer = MultiHeadAttention(x.shape[-1], num_heads).to(x.dtype)
    layer.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return layer(x, is_causal)


def grouped_query_attention(q, k, v):
    """Attention with fewer key/value heads than query heads, and no copy of keys or values.

    q: (B, H, T, d)    k, v: (B, K, S, d), K divides H    returns (B, H, T, d)

    With G = H / K, query heads 0 ... G-1 read key/value head 0, the next G read head 1, and so on.
    k and v may be a cache of gigabytes: nothing of their size may be allocated. That rules out
    repeat_interleave, expand followed by reshape, and also `@` between (B, K, G, T, d) and
    (B, K, 1, d, S), whose broadcasting copies the smaller operand.

    Source: GQA, arXiv 2305.13245, sec. 2.2.
    """
    raise NotImplementedError("grouped_query_attention: not written yet")


def attention_backward(grad_out, q, k, v, bias):
    """The gradients of O = softmax(q k^T / sqrt(d) + bias) v, written out, without autograd.

    q: (B, H, T, d)    k, v: (B, H, S, d)    grad_out: (B, H, T, d)
    bias: (H, T, S), added in every sequence of the batch, as T5's relative positions are; an entry
    of -inf masks a pair. returns (grad_q, grad_k, grad_v, grad_bias), each shaped as its tensor.

    Source: FlashAttention, arXiv 2205.14135, App. B.2; T5, arXiv 1910.10683, sec. 2.1.
    """
    raise NotImplementedError("attention_backward: not written yet")


def attend_with_cache(q, k, v, k_cache, v_cache):
    """One step of a decoder with grouped-query attention and a cache. Repair it.

    q: (B, H, T, d)    k, v: (B, K, T, d) of the T new tokens
    k_cache, v_cache: (B, K, C, d) of the C tokens before them; C may be 0
    returns (out, k_all, v_all): (B, H, T, d) and twice (B, K, C + T, d), oldest token first

    New token t stands at position C + t and sees every key up to its own. Query head h reads
    key/value head h // (H / K), which is how checkpoints are trained. The program below runs, and
    with C = 0 and K = H it even gives the right numbers: that is how it passed its tests.
    """
    k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    group_size = q.shape[1] // k.shape[1]
    keys, values = (x.repeat(1, group_size, 1, 1) for x in (k_all, v_all))
    num_queries, num_keys = q.shape[2], keys.shape[2]
    is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    scores = q @ keys.mT / math.sqrt(q.shape[-1])
    out = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ values
    return out, k_all, v_all


def attention_cost(config, seq_len, bits=16):
    """What attention costs a model: {"kv_bytes", "projection_flops", "score_flops"}, all numbers.

    config: a dict with the fields of a Hugging Face config.json: "hidden_size",
    "num_hidden_layers", "num_attention_heads"; "num_key_value_heads" is missing in models that
    share no heads; "head_dim" is missing where it is hidden_size / num_attention_heads.

    kv_bytes: keys and values of `seq_len` tokens in all layers, at `bits` an element
    projection_flops: forward FLOPs of W_Q, W_K, W_V, W_O for seq_len tokens, all layers
    score_flops: forward FLOPs of q k^T and of P v over all seq_len x seq_len pairs, all layers

    A multiplication with its addition counts as 2 FLOPs; softmax, masks and biases as none.
    """
    raise NotImplementedError("attention_cost: not written yet")


def packed_attention(q, k, v, documents, window, chunk_size):
    """Causal sliding-window attention over packed documents, in memory linear in their length.

    q, k, v: (B, H, T, d)    documents: (B, T) integers, the document of each position
    returns (B, H, T, d)

    Position t sees position s where s <= t, t - s < window, and both are of one document. Work
    through the queries `chunk_size` at a time (the last chunk may be shorter) and touch only keys
    that some query of the chunk can see: the largest scores you hold are about
    chunk_size x (chunk_size + window), never chunk_size x T and never T x T.

    Source: Mistral 7B, arXiv 2310.06825, sec. 2; Rabe and Staats, arXiv 2112.05682.
    """
    raise NotImplementedError("packed_attention: not written yet")
