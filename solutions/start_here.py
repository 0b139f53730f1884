"""Chapter 00: start here."""

import torch


def mean_pool(hidden, is_real):
    """One vector per sentence: the mean of the vectors of its real tokens.

    hidden: (B, T, D) floating    is_real: (B, T) boolean, False where a position is padding
    returns (B, D) in the dtype of `hidden`

    Positions that are padding may hold anything, nan and inf included: they must not count. A
    sentence without real tokens gets zeros. Add up in float32 at least: 200 float16 values of 1000
    have a sum that float16 cannot hold, and a mean that it can.

    Source: Sentence-BERT, arXiv 1908.10084, sec. 3 (the MEAN strategy).
    """
    # BEGIN SOLUTION
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = hidden.to(wide).masked_fill(~is_real[..., None], 0)
    num_real = is_real.sum(1, keepdim=True).clamp(min=1)
    return (kept.sum(1) / num_real).to(hidden.dtype)
    # END SOLUTION
