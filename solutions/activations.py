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
    # BEGIN SOLUTION
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) / cap
    decay = torch.exp(-2 * wide.abs())
    size = -torch.expm1(-2 * wide.abs()) / (1 + decay)
    slope = 4 * decay / (1 + decay) ** 2
    return (cap * size * wide.sign()).to(x.dtype), slope.to(x.dtype)
    # END SOLUTION


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
    # BEGIN SOLUTION
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (0.5 * wide * torch.erfc(-wide / math.sqrt(2))).to(x.dtype)
    # END SOLUTION


def swish_backward(grad_y, x, beta):
    """The gradients of y = x * sigmoid(beta * x) for x and for the trained number beta.

    grad_y, x: the same shape and floating dtype    beta: a tensor of shape () in the same dtype
    returns a tuple (grad_x, grad_beta): the shape of x, and shape ()

    One beta serves every number in x. Use tensor operations, no autograd. Large inputs must not
    become NaN: try beta * x = 1000.

    Source: arXiv 1710.05941, sec. 2, differentiated.
    """
    # BEGIN SOLUTION
    share = torch.sigmoid(beta * x)
    bend = share * torch.sigmoid(-beta * x)
    grad_x = grad_y * (share + beta * x * bend)
    return grad_x, (grad_y * x * x * bend).sum()
    # END SOLUTION


def dead_units(batches, weight, bias):
    """Which units of a ReLU layer, relu(x W^T + b), no input of a whole data set can teach.

    batches: a list of (N_i, D) tensors, of different length    weight: (F, D)    bias: (F,)
    returns a dict: active_share, a float tensor (F,), the share of all inputs whose gradient
    reaches the unit; is_dead, a boolean tensor (F,), the units that none reaches

    ReLU's slope at exactly 0 is 0. Every input counts the same, whichever batch it came in. Do not
    join the batches: a real data set does not fit in memory.
    """
    # BEGIN SOLUTION
    num_active = sum((batch @ weight.T + bias > 0).sum(0) for batch in batches)
    num_inputs = sum(len(batch) for batch in batches)
    return {"active_share": num_active.float() / num_inputs, "is_dead": num_active == 0}
    # END SOLUTION


def fused_feed_forward(x, gate_up_weight, down_weight):
    """Llama's feed-forward layer, down(silu(gate(x)) * up(x)), with gate and up in one matrix.

    x: (..., D)    gate_up_weight: (2F, D), the rows of gate first, as in Phi-3's checkpoints
    down_weight: (D, F)    returns (..., D)

    The program below runs, has the right shapes, and trains. It was ported from torch's F.glu, and
    a checkpoint loaded into it speaks nonsense. Repair it.
    """
    # BEGIN SOLUTION
    gate, up = (x @ gate_up_weight.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down_weight.T
    # STARTER
    # | up, gate = (x @ gate_up_weight.T).chunk(2, dim=-1)
    # | return (F.silu(gate) * up) @ down_weight.T
    # END SOLUTION


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
    # BEGIN SOLUTION
    hidden_dim = int(multiplier * int(2 * 4 * model_dim / 3))
    hidden_dim = math.ceil(hidden_dim / multiple_of) * multiple_of
    parameters = num_layers * 3 * model_dim * hidden_dim
    return {
        "hidden_dim": hidden_dim,
        "parameters": parameters,
        "flops_per_token": 2 * parameters,
        "versus_plain": parameters / (num_layers * 2 * model_dim * 4 * model_dim),
    }
    # END SOLUTION


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
    # BEGIN SOLUTION
    gate, up = gate_up_weight.chunk(2)
    hidden_dim = gate.shape[0]
    if hidden_dim % world_size:
        raise ValueError(f"world_size: expected a divisor of {hidden_dim}, got {world_size}")
    width = hidden_dim // world_size
    ranges = [slice(r * width, (r + 1) * width) for r in range(world_size)]
    return [(torch.cat((gate[units], up[units])), down_weight[:, units]) for units in ranges]
    # END SOLUTION


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
    # BEGIN SOLUTION
    y, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_gate_up, grad_down = torch.zeros_like(gate_up_weight), torch.zeros_like(down_weight)
    for start in range(0, len(x), tile):
        here = slice(start, start + tile)
        gate, up = (x[here] @ gate_up_weight.T).chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        hidden = gate * share * up
        y[here] = hidden @ down_weight.T
        grad_down += grad_y[here].T @ hidden
        grad_hidden = grad_y[here] @ down_weight
        slope = share * (1 + gate * (1 - share))
        grad_both = torch.cat((grad_hidden * up * slope, grad_hidden * gate * share), dim=-1)
        grad_gate_up += grad_both.T @ x[here]
        grad_x[here] = grad_both @ gate_up_weight
    return {"y": y, "grad_x": grad_x, "grad_gate_up": grad_gate_up, "grad_down": grad_down}
    # END SOLUTION
