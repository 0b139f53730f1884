"""What 4 bits cost: bits a parameter, and the bytes of fine-tuning a model.

    bits a parameter     b + 32 / block                        scales in float32
                         b + 8 / block + 32 / (block * 256)    scales quantised again
    full fine-tuning     P * (2 weights + 2 gradients + 8 Adam) = 12 P bytes (as QLoRA counts)
    LoRA                 2 P + 12 p,  p parameters in the adapters
    QLoRA                P * 4.127 / 8 + 12 p

Activations come on top of each. bytes are bytes: 1 GB = 1e9, 1 GiB = 2^30.

Papers: QLoRA, 2305.14314, abstract, sec. 2 and 3; ZeRO, 1910.02054, sec. 3.1 (16 P with float32
master weights, which QLoRA's count of full fine-tuning leaves out).
"""

from typing import NamedTuple

BYTES_16_BIT, BYTES_ADAM = 2, 8


def bits_per_parameter(
    *,
    bits: int = 4,
    block_size: int = 64,
    scale_bits: int = 32,
    outer_block_size: int | None = None,
    outer_scale_bits: int = 32,
) -> float:
    """Bits of a code and its share of the scales.

    With `outer_block_size` the scales are quantised to `scale_bits` in turn, and each outer block
    of them has a scale of `outer_scale_bits`.

    Raises: ValueError for sizes that are not positive.
    Source: arXiv 2305.14314, sec. 3.
    """
    if bits < 1 or block_size < 1 or (outer_block_size is not None and outer_block_size < 1):
        raise ValueError(
            f"bits, block_size, outer_block_size: expected more than 0, got {bits}, {block_size}, "
            f"{outer_block_size}"
        )
    outer = 0.0 if outer_block_size is None else outer_scale_bits / (block_size * outer_block_size)
    return bits + scale_bits / block_size + outer


NF4_BITS = bits_per_parameter()
QLORA_BITS = bits_per_parameter(scale_bits=8, outer_block_size=256)


class FineTuningBytes(NamedTuple):
    """Bytes that training holds all the time, without activations."""

    weights: int | float
    adapters: int | float
    gradients: int | float
    optimizer: int | float

    @property
    def total(self) -> int | float:
        return sum(self)


def full_fine_tuning_bytes(num_parameters: int | float) -> FineTuningBytes:
    """16-bit weights and gradients, Adam's two moments in float32. Source: 2305.14314, abstract."""
    gradients = BYTES_16_BIT * num_parameters
    return FineTuningBytes(
        BYTES_16_BIT * num_parameters, 0.0, gradients, BYTES_ADAM * num_parameters
    )


def adapter_fine_tuning_bytes(
    num_parameters: int | float,
    num_adapter_parameters: int | float,
    *,
    weight_bits: int | float = 16,
) -> FineTuningBytes:
    """Frozen weights at `weight_bits`, adapters in 16 bits that alone have gradients and moments.

    LoRA with weight_bits 16, QLoRA with `QLORA_BITS`.

    Raises: ValueError for bits that are not positive.
    """
    if weight_bits <= 0:
        raise ValueError(f"weight_bits: expected more than 0, got {weight_bits}")
    trained = num_adapter_parameters
    return FineTuningBytes(
        num_parameters * weight_bits / 8,
        BYTES_16_BIT * trained,
        BYTES_16_BIT * trained,
        BYTES_ADAM * trained,
    )
