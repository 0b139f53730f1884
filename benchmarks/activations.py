"""The reference's curves and feed-forward layers beside torch's kernels and transformers' layers.

The shapes are SmolLM2's: 256 tokens, D = 576, F = 1536. "formula" is the equation under autograd,
"function" the one with the gradient by hand. Fused against separate projections, and the gated
layer against the plain one of equal size, are ours against ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.measure import Row, compare
from reference.activations import (
    MLP,
    FusedSwiGLU,
    SwiGLU,
    SwiGLUFunction,
    gelu,
    relu,
    sigmoid,
    swiglu,
    swish,
    tanh,
)

NUM_TOKENS, MODEL_DIM, HIDDEN_DIM = 256, 576, 1536


def rows() -> list[Row]:
    return [*_curves(), *_gates(), *_layers()]


def _curves() -> list[Row]:
    (x,) = _leaves((NUM_TOKENS, HIDDEN_DIM))
    measured = []
    for name, ours, theirs in (
        ("relu", relu, F.relu),
        ("sigmoid", sigmoid, torch.sigmoid),
        ("tanh", tanh, torch.tanh),
        ("swish against F.silu", swish, F.silu),
        ("gelu", gelu, F.gelu),
    ):
        measured += compare(name, lambda f=ours: f(x), lambda f=theirs: f(x), (x,))
    return measured


def _gates() -> list[Row]:
    gate, up = _leaves(*[(NUM_TOKENS, HIDDEN_DIM)] * 2)

    def theirs() -> Tensor:
        return F.silu(gate) * up

    return [
        *compare("swiglu, formula", lambda: swish(gate) * up, theirs, (gate, up)),
        *compare("swiglu, torch's silu", lambda: swiglu(gate, up), theirs, (gate, up)),
        *compare("swiglu, function", lambda: SwiGLUFunction.apply(gate, up), theirs, (gate, up)),
    ]


def _layers() -> list[Row]:
    config = LlamaConfig(hidden_size=MODEL_DIM, intermediate_size=HIDDEN_DIM, num_attention_heads=9)
    theirs, ours = LlamaMLP(config), SwiGLU(MODEL_DIM, HIDDEN_DIM)
    ours.load_state_dict(theirs.state_dict())
    fused = FusedSwiGLU.from_separate(ours)
    plain = MLP(MODEL_DIM, 3 * HIDDEN_DIM // 2, curve=F.relu)
    (x,) = _leaves((NUM_TOKENS, MODEL_DIM))
    return [
        *compare("SwiGLU against LlamaMLP", lambda: ours(x), lambda: theirs(x), (x,)),
        *compare("SwiGLU, fused / separate", lambda: fused(x), lambda: ours(x), (x,)),
        *compare("SwiGLU / ReLU layer of equal size", lambda: ours(x), lambda: plain(x), (x,)),
    ]


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
