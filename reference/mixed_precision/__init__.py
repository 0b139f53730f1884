"""Mixed precision: fast, narrow formats where they suffice, float32 where they do not.

formats        bits, ranges, spacings; rounding to nearest and stochastically
accumulation   sums and products in few bits
loss_scaling   the scale, its rule, overflow and skipped steps
training       master weights and the whole recipe, step by step
autocast       which operation runs in which precision
"""

from reference.mixed_precision.accumulation import (
    compensated_sum,
    matmul_accumulating,
    running_sum,
)
from reference.mixed_precision.autocast import CPU, CUDA, Autocast, Policy
from reference.mixed_precision.formats import (
    BFLOAT16,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FORMATS,
    TF32,
    Coverage,
    FloatFormat,
    bit_string,
    coverage,
    decode,
    encode,
    fields,
    round_stochastically,
    round_to,
    spacing,
)
from reference.mixed_precision.loss_scaling import (
    LossScaler,
    ScaleRule,
    ScaleState,
    next_scale,
    unscale_,
)
from reference.mixed_precision.training import (
    MasterWeights,
    StepReport,
    mixed_precision_step,
    training_state_bytes,
    widened,
)

__all__ = [
    "BFLOAT16",
    "CPU",
    "CUDA",
    "E4M3",
    "E5M2",
    "FLOAT16",
    "FLOAT32",
    "FORMATS",
    "TF32",
    "Autocast",
    "Coverage",
    "FloatFormat",
    "LossScaler",
    "MasterWeights",
    "Policy",
    "ScaleRule",
    "ScaleState",
    "StepReport",
    "bit_string",
    "compensated_sum",
    "coverage",
    "decode",
    "encode",
    "fields",
    "matmul_accumulating",
    "mixed_precision_step",
    "next_scale",
    "round_stochastically",
    "round_to",
    "running_sum",
    "spacing",
    "training_state_bytes",
    "unscale_",
    "widened",
]
