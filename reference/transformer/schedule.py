"""The learning rate over a run: up in a straight line, down along half a cosine.

Adam's second moment is unreliable in the first steps, and a large step then does lasting harm:
warm-up waits for it. The slow end settles what a large rate leaves rattling.

Papers: warm-up, 1706.03762, sec. 5.3; cosine, SGDR, 1608.03983, eq. 5; both as in Llama,
2302.13971, sec. 2.3.
"""

import math


def cosine_with_warmup(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0
) -> float:
    """The rate of step 0, 1, ...: from 0 to `peak` in `warmup_steps`, then to `final` at the end.

    It stays at `final` beyond total_steps.

    Raises: ValueError for a negative step or a warm-up that is longer than the run.
    """
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps: expected 0 to total_steps={total_steps}, got {warmup_steps}"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def noam(step: int, *, dim: int, warmup_steps: int = 4000) -> float:
    """The schedule of 2017: d^-0.5 min(step^-0.5, step warmup^-1.5), for step 1, 2, ...

    Raises: ValueError for a step below 1.
    Source: arXiv 1706.03762, eq. 3.
    """
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    return dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)
