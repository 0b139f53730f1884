"""ZeRO and FSDP: data parallelism in which no rank holds what another holds as well.

    zero = Zero(model, comm, stage=2)              fsdp = FSDP(model, comm, model.layers)
    loss_of(model, rows).backward()                optimizer = AdamW(fsdp.parameters())
    zero.step()                                    loss_of(fsdp, rows).backward()
                                                   optimizer.step()

memory             what each stage keeps and sends, in closed form; which stage fits
flat               many tensors as one vector in N parts: ZeRO's stages and the first FSDP
stages, bucket     ZeRO 1 and 2, and plain data parallelism as stage 0; offload to the host
passes             how many backward passes a step has had
rows               parameters cut along their first dimension, many in one message
fsdp               stage 3: gather, compute, forget; prefetch, mixed precision, hybrid sharding
unit, ownership    the shards of some modules' parameters; which unit owns which
gather, notes      between shards and whole parameters, under autograd
reduction          one gradient buffer at a time; the norm of what nobody holds whole
checkpoint         written by N ranks, read by M; distributed_checkpoint, apart: in torch's format

Letters: P parameters (or elements of a unit's vector), N ranks, n = P/N a rank's part.
"""

from reference.parallel.zero.checkpoint import load_sharded, save_sharded
from reference.parallel.zero.flat import FlatLayout, layout_of
from reference.parallel.zero.fsdp import FSDP, MixedPrecision
from reference.parallel.zero.memory import (
    ADAM_BYTES,
    STAGES,
    ModelStates,
    cross_host_bytes,
    elements_sent,
    model_states_bytes,
    smallest_stage,
)
from reference.parallel.zero.passes import same_pass
from reference.parallel.zero.reduction import clip_shards
from reference.parallel.zero.rows import RowLayout
from reference.parallel.zero.stages import Zero

__all__ = [
    "ADAM_BYTES",
    "FSDP",
    "STAGES",
    "FlatLayout",
    "MixedPrecision",
    "ModelStates",
    "RowLayout",
    "Zero",
    "clip_shards",
    "cross_host_bytes",
    "elements_sent",
    "layout_of",
    "load_sharded",
    "model_states_bytes",
    "same_pass",
    "save_sharded",
    "smallest_stage",
]
