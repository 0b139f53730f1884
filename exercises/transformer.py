# Exercise bca87d30c942: write your answers below, and leave this line as it is.
"""Chapter 05: transformer."""

import math

import torch
import torch.nn.functional as F

from reference.attention import merge_heads, scaled_dot_product_attention, split_heads
from reference.normalization import rms_norm

# Layers, query heads and head width of the published Llamas, by generation and size.
LLAMA_SHAPES = {
    ("1", "7B"): (32, 32, 128),
    ("1", "65B"): (80, 64, 128),
    ("2", "7B"): (32, 32, 128),
    ("2", "13B"): (40, 40, 128),
    ("2", "70B"): (80, 64, 128),
    ("3", "8B"): (32, 32, 128),
    ("3", "70B"): (80, 64, 128),
    ("3.1", "8B"): (32, 32, 128),
    ("3.1", "70B"): (80, 64, 128),
    ("3.1", "405B"): (126, 128, 128),
}


def decoder_block(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    """One block of Llama in the middle of a text: P tokens are in its cache, T are new.

    x: (B, T, D) the residual stream of the new tokens    past_k, past_v: (B, K, P, d), P may be 0
    cos, sin: (P + T, d) for positions 0, 1, 2, ...; a head y turns into y * cos + half(y) * sin,
    where half(y) = (-second half of y, first half of y)
    weights: a dict as in checkpoints, all (out, in): "q_proj" (Hd, D), "k_proj" and "v_proj"
    (Kd, D), "o_proj" (D, Hd), "gate_proj" and "up_proj" (F, D), "down_proj" (D, F), and the norms
    "input_layernorm", "post_attention_layernorm" (D,)
    returns (y, k, v): y (B, T, D), and k, v (B, K, P + T, d) for the next call

    Pre-norm: attention and then SwiGLU each read a normalised copy and add to the stream itself.
    The cache holds turned keys. A new token sees the past, itself, and new tokens before it.

    `rms_norm(x, weight, eps=...)`, `split_heads(x, num_heads)`, `merge_heads(x)` and
    `scaled_dot_product_attention(q, k, v, mask)` (True where a query sees a key; k and v may have
    fewer heads) are there to use: the assembly is yours.

    Source: Llama, arXiv 2302.13971, sec. 2.2.
    """
    raise NotImplementedError("decoder_block: not written yet")


def next_token_loss(logits, tokens, lengths):
    """The loss of a batch of padded texts: the mean surprise, in nats, of every next token.

    logits: (B, T, V) float32    tokens: (B, T) int64    lengths: (B,) real tokens of each row
    returns a tensor of shape (), differentiable in logits

    The logits at position t are about token t + 1. Row b has lengths[b] real tokens at the left;
    what stands behind them is filling, whatever its number (here it is the number of a real token,
    as in the many tokenizers whose padding is the end-of-text token), and is never an answer. Every
    prediction of the batch weighs the same, so long texts weigh more than short ones. A batch in
    which nothing is predicted has loss 0.

    F.cross_entropy is there to use.
    """
    raise NotImplementedError("next_token_loss: not written yet")


def llama_parameters(config):
    """How many parameters a Llama has: a whole number, exact.

    config: a dict with the fields of a Hugging Face config.json: "vocab_size", "hidden_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads"; "num_key_value_heads" is
    missing where every head has its own keys, "head_dim" where it is hidden_size divided by the
    heads, "tie_word_embeddings" where it is false.

    Llama has no biases and learns no positions. Tied embeddings are one matrix, counted once.
    """
    raise NotImplementedError("llama_parameters: not written yet")


def full_context_cache_bytes(generation, size):
    """Bytes of keys and values for one text as long as the model's whole context, in bfloat16.

    generation: "1", "2", "3" or "3.1"    size: "7B", "8B", "13B", "65B", "70B" or "405B"
    returns a whole number

    LLAMA_SHAPES has layers, query heads and head width of each. How many key/value heads a model
    has, and how many tokens its context, is for you to know: see section 2.
    """
    raise NotImplementedError("full_context_cache_bytes: not written yet")


def utilization(config, seq_len, tokens_per_second, num_devices, peak_flops):
    """MFU of a training run: the share of all devices' peak that the model's arithmetic takes.

    config: as in `llama_parameters`    seq_len: tokens of each sequence
    tokens_per_second: of all devices together    peak_flops: FLOPs a second of one device
    returns a float, 0.4 for 40 %

    Count the products of matrices: the projections, the feed-forward layers, the head, and both
    products of attention over all seq_len x seq_len pairs. The embedding is looked up. A product
    with its sum is 2 FLOPs, and backward costs twice what forward does. Activations that a run
    computes anew to save memory are not the model's arithmetic.

    Source: PaLM, arXiv 2204.02311, sec. 4.1 and appendix B.
    """
    raise NotImplementedError("utilization: not written yet")


def adamw_step(param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    """One step of AdamW for one tensor.

    param, grad, m, v: tensors of one shape; m and v are the running means of the gradient and of
    its square, zeros before the first step    step: 1 for the first step
    returns (param, m, v) as new tensors

        m <- beta1 m + (1 - beta1) grad         v <- beta2 v + (1 - beta2) grad^2
        m^ = m / (1 - beta1^step)               v^ = v / (1 - beta2^step)
        param <- param - lr * weight_decay * param - lr * m^ / (sqrt(v^) + eps)

    The decay stays out of the gradient: that is the W of AdamW.

    Source: arXiv 1711.05101, algorithm 2; with lr in front of the decay, as torch has it.
    """
    raise NotImplementedError("adamw_step: not written yet")


def optimizer_step(params, grads, lr, weight_decay, max_norm):
    """One step of gradient descent with clipping and decay. Repair it.

    params, grads: dicts of tensors by name    returns (new params, norm), a dict and a float

    norm is the length of the whole gradient, all tensors seen as one vector, before clipping. Where
    it exceeds max_norm the whole gradient is multiplied by max_norm / norm; else it stays as it is.
    Then param <- param - lr * gradient, and the parameters that have two dimensions or more, the
    matrices, also lose lr * weight_decay * param. A norm's weight and a bias have one dimension and
    do not decay: zero is no place for a scale to be drawn to.

    The program below trains, and the loss falls.
    """
    new, largest = {}, 0.0
    for name, param in params.items():
        norm = float(grads[name].norm())
        largest = max(largest, norm)
        scale = min(1.0, max_norm / norm) if norm > 0 else 1.0
        new[name] = param - lr * weight_decay * param - lr * scale * grads[name]
    return new, largest


def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that a sampler draws the next token from.

    logits: (V,) float32    returns (V,) probabilities that sum to 1, zero for what is cut

    In this order: divide by the temperature; with top_k keep the k largest; with top_p keep, of
    what is left and renormalised, the smallest set of most likely tokens whose probabilities sum to
    top_p or more. So the token that crosses the line stays in, and one token always does. What is
    kept is renormalised. Temperature 0 puts everything on the largest logit. top_k may exceed V; no
    two logits are equal.

    Source: The curious case of neural text degeneration, arXiv 1904.09751, sec. 3.1.
    """
    raise NotImplementedError("next_token_probabilities: not written yet")


def merge_step(words, counts, new_id):
    """One step of training a byte-pair encoding: find the commonest pair, and merge it everywhere.

    words: a list of words, each a list of token ids    counts: how often each occurs in the text
    new_id: the id of the new token
    returns (pair, words): the two ids that were merged, as a tuple, and the words with the merge
    applied, in the same order; the lists that came in stay as they are

    A pair is two neighbours within a word; pairs of a word that occurs n times count n times. The
    positions of one pair may overlap when counted: [7, 7, 7] has the pair (7, 7) twice. Of equally
    common pairs the smallest wins, as a tuple. The merge goes through a word from the left and
    takes no token twice: [7, 7, 7] becomes [new_id, 7]. Where no word has a pair left, return
    (None, words).

    Source: arXiv 1508.07909, algorithm 1.
    """
    raise NotImplementedError("merge_step: not written yet")
