"""Quantisation: weights in 8, 4 and 3 bits, training through them, and choosing what to protect.

integer              absmax and zero point, for a tensor, a row, a group
outliers             int8 matrix products, with the outlier channels in 16 bits
levels               the tables: NF4, FP4, INT4, and 8-bit dynamic
packing              two codes in a byte
blockwise            4-bit tensors: codes and one absmax a block
double_quantization  the absmax in 8 bits
qlora                a frozen NF4 base with adapters that learn
paged_optimizer      Adam's moments as pages that make room
awq                  scales from activations, found before rounding
accounting           bits a parameter, bytes of fine-tuning
"""

from reference.quantization.accounting import (
    NF4_BITS,
    QLORA_BITS,
    FineTuningBytes,
    adapter_fine_tuning_bytes,
    bits_per_parameter,
    full_fine_tuning_bytes,
)
from reference.quantization.awq import (
    ScaleSearch,
    activation_magnitude,
    awq_round_model,
    fold_into_norm,
    scale_of,
    scaled_rounding,
    search_scale,
)
from reference.quantization.blockwise import (
    FourBitTensor,
    dequantize_4bit,
    four_bit_round,
    quantize_4bit,
)
from reference.quantization.double_quantization import (
    DoubleQuantized,
    EightBitScales,
    dequantize,
    dequantize_scales,
    double_quantize,
    double_quantize_4bit,
    quantize_scales,
)
from reference.quantization.integer import (
    IntegerTensor,
    dequantize_integer,
    quantize_absmax,
    quantize_zero_point,
    round_to_nearest,
)
from reference.quantization.levels import (
    dynamic_levels,
    float4_levels,
    integer4_levels,
    nearest_level,
    normal_float_levels,
)
from reference.quantization.outliers import int8_linear, mixed_int8_linear, outlier_channels
from reference.quantization.packing import pack, unpack
from reference.quantization.paged_optimizer import (
    OutOfDeviceMemory,
    PagedAdamW,
    PagedMemory,
    PagingCounts,
)
from reference.quantization.qlora import (
    FrozenLinearFunction,
    QLoRALinear,
    frozen_linear,
    make_qlora,
    replace_linears,
)

__all__ = [
    "NF4_BITS",
    "QLORA_BITS",
    "DoubleQuantized",
    "EightBitScales",
    "FineTuningBytes",
    "FourBitTensor",
    "FrozenLinearFunction",
    "IntegerTensor",
    "OutOfDeviceMemory",
    "PagedAdamW",
    "PagedMemory",
    "PagingCounts",
    "QLoRALinear",
    "ScaleSearch",
    "activation_magnitude",
    "adapter_fine_tuning_bytes",
    "awq_round_model",
    "bits_per_parameter",
    "dequantize",
    "dequantize_4bit",
    "dequantize_integer",
    "dequantize_scales",
    "double_quantize",
    "double_quantize_4bit",
    "dynamic_levels",
    "float4_levels",
    "fold_into_norm",
    "four_bit_round",
    "frozen_linear",
    "full_fine_tuning_bytes",
    "int8_linear",
    "integer4_levels",
    "make_qlora",
    "mixed_int8_linear",
    "nearest_level",
    "normal_float_levels",
    "outlier_channels",
    "pack",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_scales",
    "quantize_zero_point",
    "replace_linears",
    "round_to_nearest",
    "scale_of",
    "scaled_rounding",
    "search_scale",
    "unpack",
]
