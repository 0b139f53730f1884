"""Normalisation: bring activations to a fixed scale, so that depth neither inflates nor kills them.

per_token   LayerNorm and RMSNorm: each token by its own statistics
backward    their gradients, derived by hand, and autograd functions that keep little
batch_norm  BatchNorm: each channel by the statistics of the batch, or by running ones
residual    where the norm stands: Post-LN, Pre-LN, Sandwich-LN, DeepNorm
"""

from reference.normalization.backward import (
    LayerNormFunction,
    RMSNormFunction,
    layer_norm_backward,
    rms_norm_backward,
)
from reference.normalization.batch_norm import BatchNorm, batch_norm
from reference.normalization.per_token import (
    LayerNorm,
    RMSNorm,
    layer_norm,
    layer_norm_statistics,
    rms_norm,
    rms_norm_statistic,
)
from reference.normalization.residual import (
    DeepNorm,
    DeepNormConstants,
    PostNorm,
    PreNorm,
    SandwichNorm,
    deepnorm_constants,
    deepnorm_encoder_decoder_constants,
)

__all__ = [
    "BatchNorm",
    "DeepNorm",
    "DeepNormConstants",
    "LayerNorm",
    "LayerNormFunction",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "RMSNormFunction",
    "SandwichNorm",
    "batch_norm",
    "deepnorm_constants",
    "deepnorm_encoder_decoder_constants",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_statistics",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_statistic",
]
