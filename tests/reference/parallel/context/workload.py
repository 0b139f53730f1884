"""Attention over a whole text on one rank, by torch, and the same on ranks by whatever method."""

import torch
import torch.nn.functional as F

from reference.parallel.context import ContextParallel

LAYOUTS = ("contiguous", "zigzag", "striped")


def inputs(batch=2, heads=4, kv_heads=2, seq_len=16, width=4, dtype=torch.float64):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(
        torch.randn(batch, n, seq_len, width, generator=generator, dtype=dtype) for n in counts
    )


def one_rank(q, k, v, grad, *, is_causal=True):
    """torch's attention and its gradients, in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*leaves, is_causal=is_causal, enable_gqa=True)
    y.backward(grad.double())
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def in_parts(comm, given, **options):
    """Output and gradients, each brought together from all ranks."""
    context = ContextParallel(comm, **options)
    *qkv, grad = (context.part(x, 2) for x in given)
    leaves = [x.requires_grad_() for x in qkv]
    out = context.attend(*leaves)
    out.backward(grad)
    return [context.whole(x, 2) for x in (out, *(leaf.grad for leaf in leaves))]
