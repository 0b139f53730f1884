"""What one iteration of serving costs on a machine: the larger of reading and computing.

    read      weights once, and the keys and values of every sequence
    compute   2 FLOPs a weight and token through the model
    seconds   max(read / bandwidth, compute / peak)

Decoding a few sequences reads all weights for a few FLOPs each: intensity is about the number of
tokens in the batch, and the machine waits for its memory until that reaches the ridge point.
Attention's own FLOPs are left out: they are few beside the weights' in short texts.

Source: Williams et al., "Roofline", 2009, CACM 52(4).
"""

from dataclasses import dataclass

from reference.kv_cache.request import Iteration


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peak FLOPs and bytes a second."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge_point(self) -> float:
        """FLOPs a byte from which on arithmetic is the limit."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Parameters, bytes of each, and bytes of cache a token (`attention.kv_cache_bytes`)."""

    num_parameters: int
    bytes_per_parameter: int
    kv_bytes_per_token: int


def iteration_flops(model: ServedModel, iteration: Iteration) -> int:
    """2 a parameter and token."""
    return 2 * model.num_parameters * iteration.num_tokens


def iteration_bytes(model: ServedModel, iteration: Iteration) -> int:
    """Weights once, and the cache that is held."""
    weights = model.num_parameters * model.bytes_per_parameter
    return weights + model.kv_bytes_per_token * iteration.held_tokens


def iteration_intensity(model: ServedModel, iteration: Iteration) -> float:
    """FLOPs a byte."""
    return iteration_flops(model, iteration) / iteration_bytes(model, iteration)


def iteration_seconds(model: ServedModel, iteration: Iteration, machine: Machine) -> float:
    """Seconds of one iteration by the roofline."""
    return max(
        iteration_bytes(model, iteration) / machine.bytes_per_second,
        iteration_flops(model, iteration) / machine.flops_per_second,
    )
