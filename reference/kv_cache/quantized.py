"""The int8 cache: one byte an element and one scale for each row.

    scale = max |x| / 127        code = round(x / scale)        x' = code * scale

A row is one token of one head, so that a new token never touches the scales of older ones. Values
have no outlier channels; keys do (KIVI, arXiv 2402.02750), and a scale for each channel suits them
better, at the price of quantising whole groups of tokens at once. With 8 bits rows will do.

Shapes: B batch, K key/value heads, T new tokens, S all tokens, d head width.
Sources: symmetric absmax quantisation, LLM.int8(), arXiv 2208.07339, sec. 2; KIVI, 2402.02750.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from reference.kv_cache.dynamic import DynamicCache, Keys, check_new


def quantize_rows(
    x: Float[Tensor, "..."], dim: int = -1
) -> tuple[Int8[Tensor, "..."], Float[Tensor, "..."]]:
    """int8 codes in -127 ... 127 and the float32 scales, with `dim` of size 1.

    `dim=-1` gives each row a scale, `dim=-2` each channel. Zeros stay zeros. Arithmetic in
    float32; the error is at most half a scale. A row with NaN or inf comes back as NaN: its scale
    is not finite, which int8 alone could not say.
    """
    wide = x.float()
    # No smaller than the smallest normal number: below it a scale is itself rounded.
    scale = (wide.abs().amax(dim, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (wide / scale).nan_to_num_(0.0).round_().clamp_(-127, 127).to(torch.int8)
    return codes, torch.where(scale.isinf(), torch.nan, scale)


def dequantize(
    codes: Int8[Tensor, "..."], scale: Float[Tensor, "..."], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """The values that the codes stand for."""
    return (codes.float() * scale).to(dtype)


class Int8Cache:
    """Holds codes and scales; each update dequantises what it returns, new tokens as well.

    So a token attends to the same keys now as later, and the result does not depend on how the
    text was cut into calls.
    """

    def __init__(self) -> None:
        self.codes, self.scales = DynamicCache(), DynamicCache()

    def update(
        self, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"], layer: int
    ) -> tuple[Keys, Keys]:
        """Quantise and append, and return all of a layer in the dtype of k.

        Raises: ValueError for a layer out of order or shapes that do not fit what is held.
        """
        check_new(k, v, None)
        (k_codes, k_scale), (v_codes, v_scale) = quantize_rows(k), quantize_rows(v)
        codes = self.codes.update(k_codes, v_codes, layer)
        scales = self.scales.update(k_scale, v_scale, layer)
        keys, values = (dequantize(c, s, k.dtype) for c, s in zip(codes, scales, strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.codes.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: d + 4 a row instead of 4 d."""
        return self.codes.nbytes + self.scales.nbytes
