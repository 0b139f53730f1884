"""Activations: the curves between linear layers, and the gates that replaced them.

pointwise  ReLU, leaky ReLU, sigmoid, tanh, Swish, SiLU, GELU
backward   their slopes, derived by hand, and SwiGLU as an autograd function that keeps little
units      which units are active, and which are dead
gated      GLU, ReGLU, GEGLU, SwiGLU, and the feed-forward layers made of them
width      the 2/3 rule, Llama's rounding, parameters and FLOPs
"""

from reference.activations.backward import (
    SwiGLUFunction,
    geglu_backward,
    gelu_slope,
    glu_backward,
    leaky_relu_slope,
    reglu_backward,
    relu_slope,
    sigmoid_slope,
    silu_slope,
    swiglu_backward,
    swish_beta_slope,
    swish_slope,
    tanh_slope,
)
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
from reference.activations.units import active_share, dead_units
from reference.activations.width import (
    feed_forward_flops,
    feed_forward_parameters,
    swiglu_hidden_dim,
)

__all__ = [
    "FusedSwiGLU",
    "GatedMLP",
    "MLP",
    "SwiGLU",
    "SwiGLUFunction",
    "active_share",
    "dead_units",
    "feed_forward_flops",
    "feed_forward_parameters",
    "geglu",
    "geglu_backward",
    "gelu",
    "gelu_slope",
    "glu",
    "glu_backward",
    "leaky_relu",
    "leaky_relu_slope",
    "pack_gate_up",
    "reglu",
    "reglu_backward",
    "relu",
    "relu_slope",
    "sigmoid",
    "sigmoid_slope",
    "silu",
    "silu_slope",
    "swiglu",
    "swiglu_backward",
    "swiglu_hidden_dim",
    "swish",
    "swish_beta_slope",
    "swish_slope",
    "tanh",
    "tanh_slope",
    "unpack_gate_up",
]
