# Exercise 7366882d462e: write your answers below, and leave this line as it is.
"""Chapter 02: activations."""

import math

import torch
import torch.nn.functional as F


def soft_cap(x, cap):
    """cap * tanh(x / cap) and its slope: the cap that Gemma 2 puts on its scores and logits.

    x: any shape and floating dtype    cap: a positive number
    returns a tuple (y, slope), both in the shape and dtype of x; slope is dy/dx

    Small x pass almost unchanged, large ones approach cap or -cap. Build it from torch.exp (or
    torch.expm1): torch.tanh and torch.sigmoid are the answer sheet. No input may overflow, 10,000
    times the cap included. For float16 and bfloat16 input all of it happens in float32, and the
    result is rounded once, at the end.

    Source: Gemma 2, arXiv 2408.00118, sec. 2 (logit soft-capping).
    """
    raise NotImplementedError("soft_cap: not written yet")


def gelu(x):
    """GELU, x * Phi(x), with its digits kept in the left tail.

    x: any shape and floating dtype    returns the shape and dtype of x

    Phi(x) = (1 + erf(x / sqrt(2))) / 2 is the share of a standard normal distribution below x. The
    exact form is asked for, not an approximation. In float32 the sum 1 + erf(...) cancels: at
    x = -4 three digits are left, at x = -6 none. Keep the relative error below 1e-4 down to -8. For
    float16 and bfloat16 input all of it happens in float32, and the result is rounded once.

    F.gelu is the answer sheet, though it fails in the tail.

    Source: arXiv 1606.08415, sec. 2.
    """
    raise NotImplementedError("gelu: not written yet")


def swish_backward(grad_y, x, beta):
    """The gradients of y = x * sigmoid(beta * x) for x and for the trained number beta.

    grad_y, x: the same shape and floating dtype    beta: a tensor of shape () in the same dtype
    returns a tuple (grad_x, grad_beta): the shape of x, and shape ()

    One beta serves every number in x. Use tensor operations, no autograd. Large inputs must not
    become NaN: try beta * x = 1000.

    Source: arXiv 1710.05941, sec. 2, differentiated.
    """
    raise NotImplementedError("swish_backward: not written yet")


def dead_units(batches, weight, bias):
    """Which units of a ReLU layer, relu(x W^T + b), no input of a whole data set can teach.

    batches: a list of (N_i, D) tensors, of different length    weight: (F, D)    bias: (F,)
    returns a dict: active_share, a float tensor (F,), the share of all inputs whose gradient
    reaches the unit; is_dead, a boolean tensor (F,), the units that none reaches

    ReLU's slope at exactly 0 is 0. Every input counts the same, whichever batch it came in. Do not
    join the batches: a real data set does not fit in memory.
    """
    raise NotImplementedError("dead_units: not written yet")


def fused_feed_forward(x, gate_up_weight, down_weight):
    """Llama's feed-forward layer, down(silu(gate(x)) * up(x)), with gate and up in one matrix.

    x: (..., D)    gate_up_weight: (2F, D), the rows of gate first, as in Phi-3's checkpoints
    down_weight: (D, F)    returns (..., D)

    The program below runs, has the right shapes, and trains. It was ported from torch's F.glu, and
    a checkpoint loaded into it speaks nonsense. Repair it.
    """
    up, gate = (x @ gate_up_weight.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down_weight.T


def feed_forward_plan(model_dim, num_layers, multiplier, multiple_of):
    """The feed-forward layers of a Llama: their width, their weights, their work.

    returns a dict
        hidden_dim         2/3 of 4 * model_dim, cut to a whole number; times multiplier, cut to a
                           whole number; rounded up to a multiple of multiple_of
        parameters         the weights of all num_layers SwiGLU layers; there are no biases
        flops_per_token    of their matrix products in one forward pass; a product-sum counts as 2
        versus_plain       their weights, divided by those of num_layers plain layers: two matrices,
                           hidden width 4 * model_dim

    Source: arXiv 2002.05202, sec. 2; meta-llama/llama-models, models/llama3/model.py.
    """
    raise NotImplementedError("feed_forward_plan: not written yet")


def shard_gate_up(gate_up_weight, down_weight, world_size):
    """Cut a fused SwiGLU layer into one smaller layer for each of `world_size` devices.

    gate_up_weight: (2F, D), the rows of gate first    down_weight: (D, F)
    returns a list of world_size tuples (gate_up_shard, down_shard), of shapes (2F / world_size, D)
    and (D, F / world_size)

    Each shard is a fused layer of its own, its rows of gate first; the outputs of all shards add up
    to the output of the whole layer. Device r gets the r-th of world_size equal, contiguous ranges
    of hidden units. Where F is no multiple of world_size: ValueError.

    Chapter 13 builds tensor parallelism on this.
    """
    raise NotImplementedError("shard_gate_up: not written yet")


def tiled_feed_forward(x, gate_up_weight, down_weight, grad_y, tile):
    """A fused SwiGLU layer, forward and backward, `tile` tokens at a time.

    x, grad_y: (T, D)    gate_up_weight: (2F, D), gate first    down_weight: (D, F)
    tile: a positive number of tokens; T need not be a multiple of it
    returns a dict: y (T, D), and the gradients of sum(y * grad_y): grad_x (T, D), grad_gate_up
    (2F, D), grad_down (D, F)

    The hidden activations of all T tokens would be the largest tensors of a long-context model.
    Nothing larger than the largest of x, a weight, and (tile, 2F) numbers may be created. By hand
    or by torch.autograd.grad on a tile, as you like.
    """
    raise NotImplementedError("tiled_feed_forward: not written yet")
