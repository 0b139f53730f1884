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
    # BEGIN SOLUTION
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(q.dtype)
    if is_kept is not None:
        weights = weights * is_kept / (1 - dropout_rate)
    return weights @ v
    # END SOLUTION


def decoder_mask(is_real, num_queries, dtype):
    """The additive mask of a decoder: causal, and blind to padding.

    is_real: (B, S) boolean, False where position s of sequence b is padding
    num_queries: T <= S; the queries are the LAST T positions (the earlier ones are cached)
    returns (B, 1, T, S) of `dtype`: 0 where the query sees the key, -inf where it does not

    A query sees the keys at its own position and before it, if they are real. A query whose row has
    nothing to see, as a padded position on the left, gets a row of -inf. Every floating dtype holds
    -inf; float16 holds no number beyond 65504.
    """
    # BEGIN SOLUTION
    num_keys = is_real.shape[1]
    position = torch.arange(num_keys, device=is_real.device)
    is_past = position <= position[num_keys - num_queries :, None]
    is_seen = is_real[:, None, None, :] & is_past
    zeros = torch.zeros(is_seen.shape, dtype=dtype, device=is_real.device)
    return zeros.masked_fill(~is_seen, -math.inf)
    # END SOLUTION


def masked_softmax(scores, mask):
    """Softmax over the keys that a boolean mask leaves.

    scores: (..., T, S)    mask: boolean, broadcasts to scores, True = seen
    returns probabilities shaped as scores and of its dtype

    The probabilities of the seen keys of a row sum to one and unseen keys get exactly zero. A row
    that sees no key gets zeros, not NaN, and its scores get a gradient of zero. Any float dtype.
    """
    # BEGIN SOLUTION
    is_empty = ~mask.any(-1, keepdim=True)
    hidden = ~(mask | is_empty)  # an empty row sees everything for a moment, else softmax is NaN
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1, dtype=wide)
    return weights.masked_fill(is_empty, 0).to(scores.dtype)
    # END SOLUTION


class MultiHeadAttention(nn.Module):
    """Self-attention with `num_heads` heads of width dim / num_heads.

    Four linear maps without bias, named q_proj, k_proj, v_proj, o_proj, each dim to dim. Head h
    owns columns h * head_dim ... (h + 1) * head_dim - 1 of q_proj(x), k_proj(x) and v_proj(x), and
    of the merged result that o_proj receives. With `is_causal` position t sees 0 ... t.

    Source: arXiv 1706.03762, sec. 3.2.2.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        # BEGIN SOLUTION
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        # END SOLUTION

    def forward(self, x, is_causal=False):
        """x: (B, T, dim), returns (B, T, dim)."""
        # BEGIN SOLUTION
        batch, seq_len, dim = x.shape
        split = (batch, seq_len, self.num_heads, dim // self.num_heads)
        q, k, v = (
            f(x).view(split).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if is_causal:
            is_future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(is_future, -math.inf)
        heads = scores.softmax(-1) @ v
        return self.o_proj(heads.transpose(1, 2).reshape(batch, seq_len, dim))
        # END SOLUTION


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
    # BEGIN SOLUTION
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # The group joins the queries: G * T rows that share one key/value head.
    rows = q.reshape(batch, num_kv_heads, -1, head_dim)
    weights = (rows @ k.mT / math.sqrt(head_dim)).softmax(-1)
    return (weights @ v).reshape(batch, num_heads, num_queries, v.shape[-1])
    # END SOLUTION


def attention_backward(grad_out, q, k, v, bias):
    """The gradients of O = softmax(q k^T / sqrt(d) + bias) v, written out, without autograd.

    q: (B, H, T, d)    k, v: (B, H, S, d)    grad_out: (B, H, T, d)
    bias: (H, T, S), added in every sequence of the batch, as T5's relative positions are; an entry
    of -inf masks a pair. returns (grad_q, grad_k, grad_v, grad_bias), each shaped as its tensor.

    Source: FlashAttention, arXiv 2205.14135, App. B.2; T5, arXiv 1910.10683, sec. 2.1.
    """
    # BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT * scale + bias).softmax(-1)
    grad_v = weights.mT @ grad_out
    grad_weights = grad_out @ v.mT
    row_mean = (grad_weights * weights).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - row_mean)
    return grad_scores @ k * scale, grad_scores.mT @ q * scale, grad_v, grad_scores.sum(0)
    # END SOLUTION


def attend_with_cache(q, k, v, k_cache, v_cache):
    """One step of a decoder with grouped-query attention and a cache. Repair it.

    q: (B, H, T, d)    k, v: (B, K, T, d) of the T new tokens
    k_cache, v_cache: (B, K, C, d) of the C tokens before them; C may be 0
    returns (out, k_all, v_all): (B, H, T, d) and twice (B, K, C + T, d), oldest token first

    New token t stands at position C + t and sees every key up to its own. Query head h reads
    key/value head h // (H / K), which is how checkpoints are trained. The program below runs, and
    with C = 0 and K = H it even gives the right numbers: that is how it passed its tests.
    """
    # BEGIN SOLUTION
    k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    group_size = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group_size, 1) for x in (k_all, v_all))
    num_queries, num_keys = q.shape[2], keys.shape[2]
    is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    scores = q @ keys.mT / math.sqrt(q.shape[-1])
    out = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ values
    return out, k_all, v_all
    # STARTER
    # | k_all, v_all = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    # | group_size = q.shape[1] // k.shape[1]
    # | keys, values = (x.repeat(1, group_size, 1, 1) for x in (k_all, v_all))
    # | num_queries, num_keys = q.shape[2], keys.shape[2]
    # | is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    # | scores = q @ keys.mT / math.sqrt(q.shape[-1])
    # | out = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ values
    # | return out, k_all, v_all
    # END SOLUTION


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
    # BEGIN SOLUTION
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    head_dim = config.get("head_dim", config["hidden_size"] // num_heads)
    layers = config["num_hidden_layers"]
    weights = 2 * config["hidden_size"] * head_dim * (num_heads + num_kv_heads)
    return {
        "kv_bytes": layers * 2 * num_kv_heads * head_dim * seq_len * bits // 8,
        "projection_flops": layers * 2 * weights * seq_len,
        "score_flops": layers * 2 * (2 * num_heads * head_dim) * seq_len**2,
    }
    # END SOLUTION


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
    # BEGIN SOLUTION
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], chunk_size):
        stop = min(start + chunk_size, q.shape[2])
        first = max(0, start - window + 1)
        queries = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)
        is_seen = (keys <= queries) & (queries - keys < window)
        is_same = documents[:, start:stop, None] == documents[:, None, first:stop]
        scores = q[:, :, start:stop] @ k[:, :, first:stop].mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~(is_seen & is_same)[:, None], -math.inf)
        out[:, :, start:stop] = scores.softmax(-1) @ v[:, :, first:stop]
    return out
    # END SOLUTION
