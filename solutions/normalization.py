"""Chapter 01: normalization."""

import torch
from torch import nn


def rms_norm(x, weight, eps=1e-6):
    """RMSNorm over as many trailing dimensions as `weight` has.

    x: (..., *weight.shape), any floating dtype    weight: usually (D,), or (H, d) for whole heads
    returns the shape and dtype of x

    Divide x by sqrt(mean of x^2 over those dimensions + eps), then multiply by weight. For float16
    and bfloat16 input all of it happens in float32, and the result is rounded once, at the end, as
    torch.nn.functional.rms_norm does. (reference.normalization.rms_norm takes a weight (D,) alone,
    and rounds before the weight, as Llama does. Either order of rounding passes.)

    Use tensor operations; F.rms_norm is the answer sheet.

    Source: arXiv 1910.07467, eq. 4.
    """
    # BEGIN SOLUTION
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = tuple(range(-weight.ndim, 0))
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)
    # END SOLUTION


def layer_norm(x, weight, bias, dim, eps=1e-5):
    """LayerNorm along any one dimension, as a convolutional network wants it along its channels.

    x: any shape and floating dtype    weight, bias: (x.shape[dim],)    dim: may be negative
    returns the shape and dtype of x

    Along `dim`: subtract the mean, divide by sqrt(variance + eps), multiply by weight, add bias.
    The variance divides by the number of values, not by one less. For float16 and bfloat16 input
    all of it happens in float32, and the result is rounded once.

    Use tensor operations; F.layer_norm is the answer sheet.

    Source: arXiv 1607.06450, eq. 4.
    """
    # BEGIN SOLUTION
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    along = [1] * x.ndim
    along[dim] = -1
    centred = wide - wide.mean(dim, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + eps)
    return (normalised * weight.view(along) + bias.view(along)).to(x.dtype)
    # END SOLUTION


class BatchNorm(nn.Module):
    """BatchNorm of (N, C) or (N, C, L) input, one mean and variance a channel, with running ones.

    weight (C,) starts at one and bias (C,) at zero, both nn.Parameter; running_mean (C,) starts at
    zero and running_var (C,) at one, both tensors without gradient.

    In training mode (self.training) each channel is normalised by the mean and variance (divided by
    n, the number of values of the channel) of this batch, over examples and positions. Then

        running <- (1 - momentum) * running + momentum * (this batch's)

    where running_var takes the unbiased variance, divided by n - 1. In evaluation mode the running
    statistics normalise, and stay as they are. Training with one value a channel is a ValueError.

    Source: arXiv 1502.03167, algorithms 1 and 2.
    """

    def __init__(self, dim, momentum=0.1, eps=1e-5):
        super().__init__()
        # BEGIN SOLUTION
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        # END SOLUTION

    def forward(self, x):
        """x: (N, C) or (N, C, L), returns the same shape."""
        # BEGIN SOLUTION
        mean, variance = self.running_mean, self.running_var
        if self.training:
            count = x.numel() // x.shape[1]
            if count < 2:
                raise ValueError("x: one value per channel has no variance; train on more")
            over = [0, *range(2, x.ndim)]
            mean, variance = x.mean(over), x.var(over, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        channel = (-1, *[1] * (x.ndim - 2))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (x - mean.view(channel)) * scale.view(channel) + self.bias.view(channel)
        # END SOLUTION


def run_batch_norm(batches, held_out, weight, bias, momentum=0.1, eps=1e-5):
    """Train a BatchNorm on each batch, then evaluate it on `held_out`. Given: do not change.

    returns a dict: outputs (a list, one a batch), running_mean and running_var after training,
    evaluated, running_mean_after, which evaluation should leave alone, has_graph, whether running
    statistics require a gradient, weight_at_start and bias_at_start
    """
    norm = BatchNorm(weight.numel(), momentum, eps)
    weight_at_start, bias_at_start = norm.weight.detach().clone(), norm.bias.detach().clone()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    norm.train()
    outputs = [norm(batch.clone().requires_grad_()).detach() for batch in batches]
    has_graph = norm.running_mean.requires_grad or norm.running_var.requires_grad
    mean, variance = norm.running_mean.detach().clone(), norm.running_var.detach().clone()
    norm.eval()
    evaluated = norm(held_out).detach()
    return {
        "outputs": outputs,
        "running_mean": mean,
        "running_var": variance,
        "evaluated": evaluated,
        "running_mean_after": norm.running_mean.detach().clone(),
        "has_graph": has_graph,
        "weight_at_start": weight_at_start,
        "bias_at_start": bias_at_start,
    }


def add_rms_norm_backward(grad_y, grad_total, total, weight, eps=1e-6):
    """The gradient of a residual addition and the RMSNorm after it, as one step.

    Forward, in a Pre-LN block:  total = x + update;  y = total / sqrt(mean(total^2) + eps) * weight
    and both leave it: y goes to the next sublayer, total goes on along the skip path.

    grad_y: (..., D) dL/dy    grad_total: (..., D) what comes back along the skip path
    total: (..., D)    weight: (D,)    all float32 or float64
    returns (grad, grad_weight): grad (..., D), the same for x and update; grad_weight (D,)

    Derive it on paper first and write the formulas: autograd is the answer sheet.

    Source: arXiv 1910.07467, sec. 4.2.
    """
    # BEGIN SOLUTION
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    normalised = total * rstd
    g = grad_y * weight
    through_norm = rstd * (g - normalised * (g * normalised).mean(-1, keepdim=True))
    grad_weight = (grad_y * normalised).reshape(-1, weight.numel()).sum(0)
    return grad_total + through_norm, grad_weight
    # END SOLUTION


def deepnorm_residual(x, update, weight, bias, alpha, eps=1e-5):
    """One DeepNorm residual connection: LayerNorm of the skip path and the sublayer's update.

    x: (..., D) the skip path    update: (..., D) what the sublayer computed from x
    weight, bias: (D,) of the LayerNorm    alpha: a float above 1, a constant of the model's depth
    returns (..., D)

    The program below learns as well as the right one with 12 layers, and nothing with 48. Find the
    one thing that is wrong.

    Source: arXiv 2203.00555, sec. 4.1 and fig. 2.
    """
    # BEGIN SOLUTION
    total = alpha * x + update
    centred = total - total.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd * weight + bias
    # STARTER
    # | total = x + alpha * update
    # | centred = total - total.mean(-1, keepdim=True)
    # | rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    # | return centred * rstd * weight + bias
    # END SOLUTION


def deepnorm_plan(placement, num_layers, dim):
    """What a decoder-only model of N layers costs and risks, under Post-LN and under DeepNorm.

    placement: "post" or "deepnorm"    num_layers: N, each with an attention and a feed-forward
    sublayer, each followed by one LayerNorm with weight and bias    dim: the model width
    returns a dict of numbers:
        "alpha"      factor of the skip path (1 for Post-LN)
        "beta"       gain of the initial weights of value, output and feed-forward (1 for Post-LN)
        "trainable"  trainable numbers in all residual connections and their norms (an int)
        "update"     how far the output moves in one step of the optimizer, up to a constant that
                     does not depend on N:  number of sublayers * (v^2 + w^2) / alpha^2, where
                     v = w = beta are the gains of a sublayer's two matrices

    Source: arXiv 2203.00555, fig. 2 and sec. 4.2.
    """
    # BEGIN SOLUTION
    alpha, beta = 1.0, 1.0
    if placement == "deepnorm":
        alpha, beta = (2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25
    num_sublayers = 2 * num_layers
    return {
        "alpha": alpha,
        "beta": beta,
        "trainable": num_sublayers * 2 * dim,
        "update": num_sublayers * 2 * beta**2 / alpha**2,
    }
    # END SOLUTION


def masked_batch_norm(x, is_real, weight, bias, eps=1e-5):
    """BatchNorm of padded text in training: padding counts for nothing and comes out as zero.

    x: (B, T, C), where padded positions hold anything    is_real: (B, T) boolean, False = padding
    weight, bias: (C,)    returns (B, T, C)

    Mean and variance of each channel are over the real positions of all sequences alone; the
    variance divides by their number. Padded positions of the result are exactly zero. At least two
    positions are real. What padded positions hold, were it NaN, changes nothing.
    """
    # BEGIN SOLUTION
    real = x[is_real]  # (number of real positions, C)
    normalised = (real - real.mean(0)) * torch.rsqrt(real.var(0, correction=0) + eps)
    out = torch.zeros_like(x)
    out[is_real] = normalised * weight + bias
    return out
    # END SOLUTION


def streamed_statistics(blocks):
    """Mean and variance of each feature, reading each block once and keeping none.

    blocks: a list of tensors (n_i, C), float32; the n_i differ, and some are 0
    returns (mean, variance), each (C,) float32; the variance divides by the total count (>= 1)

    This is how a kernel normalises rows that do not fit its memory, and how ranks that each hold a
    part of a batch agree on its statistics. Two demands beside the values: no tensor larger than
    the largest block, and no cancellation: the grader's data has a mean of thousands and a variance
    near 1, where E[x^2] - E[x]^2 loses every digit in float32 (and float64 is not the way out: an
    accelerator may have none).

    Merge (count, mean, sum of squared deviations) of what was read with those of the next block.

    Source: Chan, Golub, LeVeque 1979, Updating formulae, eq. 2.1.
    """
    # BEGIN SOLUTION
    num_features = blocks[0].shape[1]
    count, mean, deviations = 0, torch.zeros(num_features), torch.zeros(num_features)
    for block in blocks:
        size = block.shape[0]
        if size == 0:
            continue
        block_mean = block.mean(0)
        gap = block_mean - mean
        total = count + size
        deviations = deviations + (block - block_mean).square().sum(0)
        deviations = deviations + gap.square() * (count * size / total)
        mean = mean + gap * (size / total)
        count = total
    return mean, deviations / count
    # END SOLUTION
