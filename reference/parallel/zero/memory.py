"""What a rank holds and sends by stage, in closed form: the table that made ZeRO famous.

P parameters, N ranks; mixed precision with Adam keeps 2 bytes of parameter, 2 of gradient and
K = 12 of float32 master weight, momentum and variance:

    stage 0   (2 + 2 + K) P                  DDP: everything on each rank
    stage 1   (2 + 2) P + K P / N            optimizer states sharded
    stage 2   2 P + (2 + K) P / N            and gradients
    stage 3   (2 + 2 + K) P / N              and parameters

    elements sent a step, a rank       2P, 2P, 2P, 3P, each times (N-1)/N

Papers: ZeRO, 1910.02054, sec. 3, 5 and 7, fig. 1, table 1; FSDP, 2304.11277, sec. 3.2.2.
"""

from dataclasses import dataclass

STAGES = (0, 1, 2, 3)
ADAM_BYTES = 12  # float32 master weight, momentum, variance
PASSES_OF_PARAMETERS = {0: 2, 1: 2, 2: 2, 3: 3}


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one rank by category."""

    parameters: float
    gradients: float
    optimizer_states: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer_states


def model_states_bytes(
    num_parameters: int | float,
    world_size: int,
    stage: int,
    *,
    parameter_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: int = ADAM_BYTES,
) -> ModelStates:
    """Bytes that a rank keeps from step to step, padding and gathered copies aside.

    FSDP with float32 shards has parameter_bytes = gradient_bytes = 4 and optimizer_bytes = 8: the
    same 16 in all.

    Raises: ValueError for another stage, a negative size or a world below 1.
    Source: ZeRO, arXiv 1910.02054, sec. 5 and fig. 1.
    """
    _check(num_parameters, world_size, stage)
    shares = [world_size if stage >= first else 1 for first in (3, 2, 1)]
    sizes = (parameter_bytes, gradient_bytes, optimizer_bytes)
    return ModelStates(*(num_parameters * b / n for b, n in zip(sizes, shares, strict=True)))


def elements_sent(num_parameters: int | float, world_size: int, stage: int) -> float:
    """Elements that a rank sends in one training step, by ring collectives.

    Stages 0 to 2: reduce-scatter the gradients, all-gather something (an all-reduce is both). Stage
    3 gathers parameters twice, for forward and for backward.

    Raises: ValueError as model_states_bytes.
    Source: ZeRO, arXiv 1910.02054, sec. 7.
    """
    _check(num_parameters, world_size, stage)
    return PASSES_OF_PARAMETERS[stage] * num_parameters * (world_size - 1) / world_size


def cross_host_bytes(model_bytes: float, world_size: int, ranks_per_host: int, kind: str) -> float:
    """What a rank sends to other hosts in a step, as the FSDP paper counts it: an upper bound.

    `kind`: "full shard" 3M(W-1)/W, "replicate" 2M(W-1)/W, "hybrid" 2M(W-1)/(GW), where the shards
    of a model lie within a host of G ranks.

    Raises: ValueError for another kind.
    Source: FSDP, arXiv 2304.11277, sec. 3.2.2.
    """
    share = (world_size - 1) / world_size
    shares = {
        "full shard": 3 * share,
        "replicate": 2 * share,
        "hybrid": 2 * share / ranks_per_host,
    }
    if kind not in shares:
        raise ValueError(f"kind: expected one of {', '.join(shares)}; got {kind!r}")
    return model_bytes * shares[kind]


def smallest_stage(
    num_parameters: int | float, world_size: int, budget_bytes: float, **sizes: int
) -> int | None:
    """The lowest stage whose model states fit; lower stages send less or keep more at hand.

    None where even stage 3 does not fit: more ranks, or the host's memory.

    Raises: ValueError as model_states_bytes.
    """
    for stage in STAGES:
        if model_states_bytes(num_parameters, world_size, stage, **sizes).total <= budget_bytes:
            return stage
    return None


def _check(num_parameters: int | float, world_size: int, stage: int) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage: expected 0 (DDP), 1, 2 or 3; got {stage}")
    if num_parameters < 0 or world_size < 1:
        raise ValueError(
            "num_parameters, world_size: expected from 0 on and from 1 on, "
            f"got {num_parameters} and {world_size}"
        )
