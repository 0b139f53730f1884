"""The reference's norms beside torch's kernels, on 512 tokens of SmolLM2's width, 576.

"plain" is the formula under autograd, "function" the one with the gradient by hand. RMSNorm is
also set against LayerNorm, ours against ours: the paper's claim (arXiv 1910.07467, abstract).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, compare
from reference.normalization import (
    LayerNormFunction,
    RMSNormFunction,
    batch_norm,
    layer_norm,
    rms_norm,
)

NUM_TOKENS, DIM = 512, 576


def rows() -> list[Row]:
    measured = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        measured += _per_token(name, *_leaves(dtype))
    return [*measured, *_batch_norm(*_leaves(torch.float32)), *_papers_claim()]


def _per_token(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[Row]:
    shape = weight.shape

    def torch_layer_norm() -> Tensor:
        return F.layer_norm(x, shape, weight, bias)

    def torch_rms_norm() -> Tensor:
        return F.rms_norm(x, shape, weight, 1e-6)

    return [
        *compare(
            f"layer_norm {name}, plain",
            lambda: layer_norm(x, weight, bias),
            torch_layer_norm,
            (x, weight, bias),
        ),
        *compare(
            f"layer_norm {name}, function",
            lambda: LayerNormFunction.apply(x, weight, bias, 1e-5),
            torch_layer_norm,
            (x, weight, bias),
        ),
        *compare(
            f"rms_norm {name}, plain", lambda: rms_norm(x, weight), torch_rms_norm, (x, weight)
        ),
        *compare(
            f"rms_norm {name}, function",
            lambda: RMSNormFunction.apply(x, weight, 1e-6),
            torch_rms_norm,
            (x, weight),
        ),
    ]


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> list[Row]:
    mean, var = torch.zeros(DIM), torch.ones(DIM)
    measured = []
    for mode in ("training", "evaluation"):
        training = mode == "training"
        measured += compare(
            f"batch_norm, {mode}",
            lambda t=training: batch_norm(x, mean, var, weight, bias, training=t).y,
            lambda t=training: F.batch_norm(x, mean, var, weight, bias, t),
            (x, weight, bias),
        )
    return measured


def _papers_claim() -> list[Row]:
    x, weight, bias = _leaves(torch.float32)
    return compare(
        "RMSNorm / LayerNorm, both ours",
        lambda: RMSNormFunction.apply(x, weight, 1e-6),
        lambda: LayerNormFunction.apply(x, weight, bias, 1e-5),
        (x, weight),
    )


def _leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((NUM_TOKENS, DIM), (DIM,), (DIM,))
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
