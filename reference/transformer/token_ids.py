"""What may be asked of token ids before they index anything: whole numbers, within the vocabulary.

An id out of range is an unreadable error on a GPU, and a negative one counts from the end.
"""

import torch
from torch import Tensor


def check_token_ids(name: str, ids: Tensor, vocab_size: int, *, ignored: int | None = None) -> None:
    """Refuse ids outside 0 ... vocab_size - 1, but for `ignored`.

    Raises: TypeError for what is no whole number, ValueError for the range.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected whole numbers, got {ids.dtype}; {name}.long()")
    if not has_values(ids) or not ids.numel():
        return
    seen = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
    low, high = (int(bound) for bound in seen.aminmax())
    if low < 0 or high >= vocab_size:
        remedy = "is the tokenizer this model's?" if ignored is None else f"or {ignored} for none"
        raise ValueError(
            f"{name}: expected ids in 0 ... {vocab_size - 1}, got {low} ... {high}; {remedy}"
        )


def has_values(tensor: Tensor) -> bool:
    """Whether the numbers can be looked at: not on the meta device, nor while being traced."""
    return type(tensor) is Tensor and not (tensor.is_meta or torch.compiler.is_compiling())
