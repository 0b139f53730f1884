"""Features, each as: how the model, the data and the step differ, and what is compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reference.lora import LoRAConfig, add_adapter
from tests.reference.parallel.composition.workload import fresh, probed


@dataclass(frozen=True)
class Feature:
    """`used`: the (step, micro-batch, part of the rows) in which a probed model's spare is used."""

    name: str
    model: Callable[[], torch.nn.Module] = fresh
    has_holes: bool = False
    has_groups: bool = False
    num_micro: int = 1
    max_norm: float | None = None
    is_autocast: bool = False
    checkpointing: str | None = None
    used: frozenset[tuple[int, int, int]] = frozenset()
    has_probe: bool = False
    is_random: bool = False
    restarts: bool = False


def frozen():
    """The embedding and the first layer, as fine-tuning the top does: a whole pipeline stage."""
    model = fresh()
    model.embed_tokens.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    return model


def partly_frozen():
    """Some in each layer, so that each bucket, unit and stage has both."""
    model = fresh()
    for layer in model.layers:
        layer.self_attn.requires_grad_(False)
        layer.post_attention_layernorm.requires_grad_(False)
    return model


def adapted(dropout=0.0):
    model = fresh()
    add_adapter(model, LoRAConfig(rank=2, alpha=4.0, targets="all-linear", dropout=dropout))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):  # zero, which no gradient of A comes through
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def in_two_places():
    model = fresh()
    model.lm_head.weight = model.embed_tokens.weight
    return model


FEATURES = [
    Feature("nothing more"),
    Feature("frozen parameters", partly_frozen),
    Feature("frozen first layers", frozen),
    Feature("LoRA", adapted),
    Feature("tied weights", lambda: fresh(is_tied=True)),
    Feature("one parameter, two places", in_two_places),
    Feature("buffers and unused parameters", probed, has_probe=True, used=frozenset({(1, 0, 0)})),
    Feature("accumulation", num_micro=2),
    Feature("accumulation, other parameters used", probed, has_probe=True, num_micro=2,
            used=frozenset({(0, 0, 0), (1, 1, 0)})),
    Feature("unequal token counts", has_holes=True, num_micro=2),
    Feature("weight-decay groups", has_groups=True),
    Feature("clipping", max_norm=0.05),
    Feature("autocast", is_autocast=True),
    Feature("recomputation, full", checkpointing="full"),
    Feature("recomputation, selective", checkpointing="selective"),
    Feature("torch.utils.checkpoint", checkpointing="torch"),
    Feature("dropout", lambda: adapted(dropout=0.3), is_random=True),
    Feature("checkpoint at another size", restarts=True),
]  # fmt: skip
