"""Memory of the fullest rank under a plan, by category.

Each stage of the pipeline holds its layers' parameters, gradients and optimizer states, divided by
the tensor ranks and then as ZeRO divides them (reference.parallel.zero.memory), and the activations
of the micro-batches in flight. The first stage has most of these, the last one the logits.
"""

from dataclasses import dataclass
from functools import lru_cache

from reference.parallel.pipeline import layers_of_stages
from reference.parallel.planner.activations import (
    head_bytes,
    in_flight,
    layer_bytes,
    working_bytes,
)
from reference.parallel.planner.plans import Batch, Plan
from reference.parallel.planner.shapes import ModelShape
from reference.parallel.zero import ModelStates, model_states_bytes
from reference.parallel.zero.memory import ADAM_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `gathered`: what ZeRO-3 has in whole for a moment. `host`: of the CPU's
    memory, which the total leaves out."""

    states: ModelStates
    activations: float
    gathered: float
    host: float

    @property
    def total(self) -> float:
        return self.states.total + self.activations + self.gathered

    def __str__(self) -> str:
        parts = {
            "parameters": self.states.parameters,
            "gradients": self.states.gradients,
            "optimizer": self.states.optimizer_states,
            "activations": self.activations,
            "gathered": self.gathered,
            "host (not counted)": self.host,
        }
        words = [f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7]
        return f"{self.total / 1e9:.1f} GB: {', '.join(words)}"


def memory_bytes(model: ModelShape, plan: Plan, batch: Batch) -> Memory:
    """Of the fullest rank; the plan must fit the model (plans.misfits).

    Source: ZeRO, 1910.02054, sec. 5; Narayanan et al., 2104.04473, sec. 2.2; Korthikanti et al.,
    2205.05198, sec. 4.
    """
    ends = {0, plan.pipeline - 1}
    return max((_rank_memory(model, plan, batch, rank) for rank in ends), key=lambda m: m.total)


@lru_cache(maxsize=1024)
def layers_of_ranks(num_layers: int, pipeline: int, num_chunks: int) -> tuple[int, ...]:
    """How many layers each rank of a pipeline has."""
    stages = [len(part) for part in layers_of_stages(num_layers, pipeline * num_chunks)]
    return tuple(sum(stages[rank::pipeline]) for rank in range(pipeline))


def rank_parameters(model: ModelShape, plan: Plan, rank: int) -> float:
    """Parameters that a stage holds under tensor parallelism, before ZeRO divides them."""
    num_layers = layers_of_ranks(model.num_layers, plan.pipeline, plan.num_chunks)[rank]
    is_last = rank == plan.pipeline - 1
    return model.parameters_of(num_layers, is_first=rank == 0, is_last=is_last) / plan.tensor


def _rank_memory(model: ModelShape, plan: Plan, batch: Batch, rank: int) -> Memory:
    num_layers = layers_of_ranks(model.num_layers, plan.pipeline, plan.num_chunks)[rank]
    parameters = rank_parameters(model, plan, rank)
    states = model_states_bytes(
        parameters,
        plan.replicas,
        plan.zero_stage,
        gradient_bytes=plan.gradient_bytes,
        optimizer_bytes=0 if plan.is_offloaded else ADAM_BYTES,
    )
    host = ADAM_BYTES * parameters / plan.replicas if plan.is_offloaded else 0.0
    alive = in_flight(plan, rank, plan.num_micro(batch))
    kept = alive * num_layers * layer_bytes(model, plan, batch)
    at_work = working_bytes(model, plan, batch)
    if rank == plan.pipeline - 1:
        at_work = max(at_work, head_bytes(model, plan, batch))
    return Memory(states, kept + at_work, _gathered_bytes(model, plan), host)


def _gathered_bytes(model: ModelShape, plan: Plan) -> float:
    """ZeRO-3, at its fullest: the next layer's parameters, and a unit with its whole gradient. The
    unit is a layer or, while the loss is made, the head."""
    if plan.zero_stage < 3 or plan.replicas == 1:
        return 0.0
    unit = max(model.layer_parameters, model.vocab_size * model.dim)
    return (2 * model.layer_parameters + (2 + plan.gradient_bytes) * unit) / plan.tensor
