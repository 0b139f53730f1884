"""Activations: the curves between linear layers, and the gates that replaced them.

pointwise  ReLU, leaky ReLU, sigmoid, tanh, Swish, SiLU, GELU
backward   their slopes, derived by hand, and SwiGLU as an autograd function that keeps little
units      which units are active, and which are dead
gated      GLU, ReGLU, GEGLU, SwiGLU, and the feed-forward layers made of them
width      the 2/3 rule, Llama's rounding, parameters and FLOPs
"""

from reference.activations.gated import (
    MLP,
    FusedSwiGLU,
    GatedMLP,
    SwiGLU,
    geglu,
    glu,
    pack_gate_up,
    reglu,
    swiglu,
    unpack_gate_up,
)
from reference.activations.pointwise import gelu, leaky_relu, relu, sigmoid, silu, swish, tanh
from reference.activations.width import (
    feed_forward_flops,
    feed_forward_parameters,
    swiglu_hidden_dim,
)

__all__ = [
    "MLP",
    "FusedSwiGLU",
    "GatedMLP",
    "SwiGLU",
    "feed_forward_flops",
    "feed_forward_parameters",
    "geglu",
    "gelu",
    "glu",
    "leaky_relu",
    "pack_gate_up",
    "reglu",
    "relu",
    "sigmoid",
    "silu",
    "swiglu",
    "swiglu_hidden_dim",
    "swish",
    "tanh",
    "unpack_gate_up",
]
