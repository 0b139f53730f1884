# Exercise f1b34ccb4781: write your answers below, and leave this line as it is.
"""Chapter 08: LoRA and its relatives."""

import math

import torch


def lora_forward(x, weight, a, b, alpha, is_rank_stabilised=False):
    """A linear layer with a LoRA adapter, without ever forming B A.

    x: (..., D)    weight: (F, D), frozen    a: (r, D)    b: (F, r)
    returns (..., F): x W^T + s * (x A^T) B^T, with s = alpha / r, or alpha / sqrt(r) where
    is_rank_stabilised

    Source: arXiv 2106.09685, sec. 4.1; arXiv 2312.03732.
    """
    raise NotImplementedError("lora_forward: not written yet")


def initial_adapter(noise, fan_out):
    """A and B at the start of training.

    noise: (r, D), independent and uniform in [-1, 1]    fan_out: F
    returns (a, b): a (r, D), b (F, r), in the dtype of noise

    The model must begin exactly as it was, and yet learn from the first step on. What is random
    is uniform between -1 / sqrt(D) and 1 / sqrt(D), as torch.nn.Linear begins; it is A.

    Source: arXiv 2106.09685, sec. 4.1.
    """
    raise NotImplementedError("initial_adapter: not written yet")


def merge_adapters(weight, adapters):
    """Put several adapters into a weight, so that the layer costs what it did without them.

    weight: (F, D)    adapters: a list of (a, b, scaling): (r_i, D), (F, r_i) and a number
    returns a new (F, D): with it, x W^T is the layer with all adapters added up

    Ranks differ from adapter to adapter.
    """
    raise NotImplementedError("merge_adapters: not written yet")


def batched_lora(x, a, b, scalings, rows):
    """What adapters add in a batch whose rows belong to different users.

    x: (B, T, D)    a: (N, r, D)    b: (N, F, r)    scalings: (N,)
    rows: (B,) whole numbers: row i uses adapter rows[i], or none where rows[i] is -1
    returns (B, T, F): scalings[n] * (x_i A_n^T) B_n^T for n = rows[i], zeros for -1

    No loop over rows or adapters: a server has hundreds of each. The base layer, which all rows
    share, is computed elsewhere.

    Source: arXiv 2310.18547, sec. 4 (Punica).
    """
    raise NotImplementedError("batched_lora: not written yet")


def adapter_gradients(grad_y, x, a, b, scaling):
    """Gradients of an adapter, y = scaling * (x A^T) B^T, by hand.

    grad_y: (N, F)    x: (N, D)    a: (r, D)    b: (F, r)
    returns (grad_a, grad_b, grad_x): (r, D), (F, r) and (N, D)

    Derive it on paper; autograd is the answer sheet. Then look at grad_a at the start, where b = 0.
    """
    raise NotImplementedError("adapter_gradients: not written yet")


def training_bytes(shapes, rank):
    """Bytes that fine-tuning adds to the frozen weights, everything in float32, with Adam.

    shapes: a list of (F, D), the adapted matrices    rank: r, of every adapter, or None for full
    fine-tuning of these matrices
    returns (parameters, gradients, optimizer): bytes of the new parameters, of all gradients, and
    of Adam's momentum and variance

    Full fine-tuning adds no parameters.
    """
    raise NotImplementedError("training_bytes: not written yet")


def layer_flops(fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False):
    """FLOPs of matrix products in a linear layer with LoRA; a multiply and add are two.

    is_merged: the adapter has been put into the weight
    is_training: forward and backward, of a layer in the middle of the model; else forward alone
    returns a number

    In backward each product of forward is followed by up to two: one for the gradient of its
    input, one for that of its weight. Which one does LoRA save? (A merged layer is not trained.)
    """
    raise NotImplementedError("layer_flops: not written yet")


def prefix_attention(q, k, v, prefix_k, prefix_v):
    """Causal attention of a text that has trained keys and values before it.

    q, k, v: (B, H, T, d)    prefix_k, prefix_v: (H, p, d), the same for each row
    returns (B, H, T, d)

    Every query sees the whole prefix, then the text up to itself, under one softmax of
    q k^T / sqrt(d).

    Source: arXiv 2101.00190, sec. 4.2.
    """
    raise NotImplementedError("prefix_attention: not written yet")


def galore_step(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    """One step of GaLore with Adam, for a matrix that is at least as high as it is wide.

    weight, gradient: (F, D), F >= D    basis: (r, D), orthonormal rows
    momentum, variance: (F, r), of the steps before    step: 1 for the first
    returns (weight, momentum, variance), all new

    Project the gradient on the basis, let Adam (beta 0.9 and 0.999) work on the small one, project
    its step back and take it:

        change = m / (sqrt(v) + 1e-6) * sqrt(1 - 0.999^step) / (1 - 0.9^step)

    times lr and scale. No tensor larger than (F, D) is needed, and no state larger than (F, r).

    Source: arXiv 2403.03507, algorithm 2.
    """
    raise NotImplementedError("galore_step: not written yet")
