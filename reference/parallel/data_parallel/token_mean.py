"""The loss of a step: one mean, over all the tokens that count.

The tokens of a step are divided over micro-batches and over the ranks of several axes, and padding
and prompts, labelled -100, leave each part another number that count. A mean of the parts' means
gives the tokens of a short part more weight than those of a long one. So count first, then let each
part give its share:

    mean = token_mean(targets, mesh["dp", "cp"])           one all-reduce of one number
    for x, t in micro_batches:                             that targets are made of
        mean.share(losses_of(model(x), t), t).backward()   sum of losses / count of the whole step
    ...                                                    gradients are summed over dp and cp

Who averages gradients afterwards (DDP, ZeRO and FSDP do, over their ranks) divides a second time;
`averaged_by=mesh.dp.size` multiplies beforehand by as much. Tensor and pipeline ranks do not divide
tokens, and are not asked.

Sources: transformers#34191 and torchtitan#2206, in which two trainers came to this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from reference.parallel.ranks import Comm
from reference.transformer.loss import IGNORED


@dataclass(frozen=True)
class TokenMean:
    """The mean of a step, of which parts give their shares. `count`: of all the tokens in it.

    `averaged_by`: the ranks over which gradients are averaged afterwards, 1 where they are summed.

    Raises: ValueError for `averaged_by` below 1.
    """

    count: Float[Tensor, ""]
    averaged_by: int = 1

    def __post_init__(self) -> None:
        if self.averaged_by < 1:
            raise ValueError(f"averaged_by: expected at least 1, got {self.averaged_by}")

    def share(
        self, losses: Float[Tensor, "*losses"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, ""]:
        """This part's share: the sum of its counted losses / `count` * `averaged_by`.

        Shares of all parts add up to the mean, or average to it over `averaged_by` ranks; in
        float32 at least. Zero, with gradients of zero, where nothing counts.

        Raises: ValueError where losses are not one for each target, a mean for example.
        """
        if losses.numel() != targets.numel():
            raise ValueError(
                f"losses: expected one for each of the targets, {targets.numel()} of shape "
                f"{tuple(targets.shape)}, got shape {tuple(losses.shape)}; do not reduce them"
            )
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        if not targets.is_floating_point():
            wide = wide.masked_fill(~is_counted(targets).view(losses.shape), 0)
        total = wide.sum()
        return total * (self.averaged_by / self.count.clamp(min=1).to(total.dtype))


def token_mean(
    targets: Shaped[Tensor, "*targets"], *groups: Comm, averaged_by: int = 1
) -> TokenMean:
    """Count a step's targets: this rank's, of all micro-batches, summed over `groups`.

    `groups` are those that divide the tokens, data and context parallel: collective. Whole-numbered
    targets count unless they are -100, a mask of booleans where it is true, all others always.

    Raises: ValueError for `averaged_by` below 1.
    """
    count = is_counted(targets).sum()
    for group in groups:
        count = group.all_reduce(count)
    return TokenMean(count.double(), averaged_by)


def is_counted(targets: Shaped[Tensor, "*targets"]) -> Bool[Tensor, "*targets"]:
    """Which targets count; see `token_mean`."""
    if targets.dtype == torch.bool:
        return targets
    if targets.is_floating_point():
        return torch.ones_like(targets, dtype=torch.bool)
    return targets != IGNORED
