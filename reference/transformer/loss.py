"""The loss of a language model: how surprising each next token was.

Position t has seen tokens 0 ... t and is asked for token t + 1, so logits and labels are one apart;
the last position has no label. Padding is labelled -100 and does not count, neither above nor below
the fraction.

    loss = - sum over labelled t of log softmax(logits_t)[token_(t+1)] / number of labelled t

Shapes: B batch, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.transformer.token_ids import check_token_ids

IGNORED = -100


def next_token_loss(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of each position's logits with the NEXT position's label, in nats.

    `labels` are the tokens themselves, unshifted, with -100 where none is to be predicted: padding,
    or the prompt when only answers are trained. In float32 at least. The labels are moved rather
    than the logits cut: a cut of (B, T, V) would be copied, and it is the largest tensor there is.
    'mean' over no label at all is 0, with zero gradient, rather than NaN.

    `reduction` is 'mean', 'sum', or 'none': then (B, T - 1), zero where no label is.

    Raises: ValueError for shapes that do not fit, labels outside the vocabulary or an unknown
    reduction; TypeError for labels that are no whole numbers.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape or labels.shape[1] < 1:
        raise ValueError(
            "logits, labels: expected (B, T, V) and (B, T) with T >= 1, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}; do not shift them"
        )
    _check(logits, labels, reduction)
    moved = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = _cross_entropy(logits, moved, reduction)
    return losses[:, :-1] if reduction == "none" else losses


def cross_entropy(
    logits: Float[Tensor, "*B V"], labels: Int[Tensor, "*B"], *, reduction: str = "mean"
) -> Float[Tensor, "..."]:
    """The same without a shift: each row of logits with its own label, -100 for none.

    Any dimensions, or none, before the vocabulary; for batches of inputs and targets that are one
    token apart already. 'none' has the shape of the labels.

    Raises: as `next_token_loss`.
    """
    _check(logits, labels, reduction)
    return _cross_entropy(logits, labels, reduction)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(
        wide.reshape(-1, logits.shape[-1]),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none" if reduction == "none" else "sum",
    )
    if reduction == "none":
        return total.view(labels.shape)
    return total if reduction == "sum" else total / (labels != IGNORED).sum().clamp(min=1)


def _check(logits: Tensor, labels: Tensor, reduction: str) -> None:
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "logits, labels: expected (..., V) and (...), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    check_token_ids("labels", labels, logits.shape[-1], ignored=IGNORED)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
