"""Two 4-bit codes in a byte: the first in the high half.

    byte = code[2i] * 16 + code[2i + 1]

Papers: none; the order is that of bitsandbytes, so that its files and ours hold the same bytes.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "... codes"]) -> UInt8[Tensor, "... bytes"]:
    """Half as many bytes as codes.

    Raises: TypeError for a dtype other than uint8; ValueError for an odd number or codes over 15.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected dtype torch.uint8, got {codes.dtype}")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(
            f"codes: expected an even number in the last dimension, got shape "
            f"{tuple(codes.shape)}; pad with a zero"
        )
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: expected 0 to 15, got {int(codes.max())}; 4 bits hold 16 values")
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack(packed: UInt8[Tensor, "... bytes"]) -> UInt8[Tensor, "... codes"]:
    """The codes again, twice as many as bytes.

    Raises: TypeError for a dtype other than uint8.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected dtype torch.uint8, got {packed.dtype}")
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)
