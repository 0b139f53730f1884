"""Which models can be divided: a Llama, with or without LoRA, of which nothing would be lost.

A part that leaves something out, an adapter or a hook, is another model without a message. So each
module has to be of a kind that is divided by hand, and whatever the whole has under a name, the
part must have under the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reference.activations import GatedMLP, SwiGLU
from reference.attention import Attention
from reference.lora.layer import Adapter, LoRALinear
from reference.normalization import RMSNorm
from reference.transformer import Block, Llama

DIVIDED = (Llama, Block, Attention, SwiGLU, GatedMLP, RMSNorm, nn.Embedding, nn.Linear, LoRALinear,
           Adapter, nn.ModuleList, nn.ModuleDict)  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LEDGER = "reference.parallel.ranks"
EMBEDDING_OPTIONS = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False,
                     "sparse": False}  # fmt: skip


def check_can_be_divided(model: nn.Module) -> None:
    """Raises: ValueError for a module of another kind, an embedding with options, or hooks."""
    for path, module in model.named_modules():
        where = path or "model"
        if type(module) not in DIVIDED:
            raise ValueError(
                f"{where}: expected a Llama of {', '.join(t.__name__ for t in DIVIDED[1:9])}, got "
                f"{type(module).__name__}, which is not divided here; divide the rows of the batch "
                "(DDP, FSDP), or take it off"
            )
        if isinstance(module, nn.Embedding):
            _check_options(where, module)
        _check_hooks(where, module, HOOKS)
        for name, parameter in module._parameters.items():
            hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
            _check_hooks(f"{path}.{name}".lstrip("."), parameter, hooks)


def check_nothing_is_lost(part: nn.Module, model: nn.Module) -> None:
    """Raises: ValueError for a parameter or buffer of the model that the part does not have."""
    lost = sorted(_names(model) ^ _names(part))
    if lost:
        raise ValueError(
            f"{lost[0]}: expected a parameter or buffer of a Llama; this one is not divided, and "
            "would be lost; take it off the model"
        )


def _check_options(where: str, embedding: nn.Embedding) -> None:
    for option, plain in EMBEDDING_OPTIONS.items():
        if (given := getattr(embedding, option)) != plain:
            raise ValueError(
                f"{where}: expected {option}={plain}, got {given}; a divided embedding has no such "
                "option"
            )


def _check_hooks(where: str, owner: Any, kinds: tuple[str, ...]) -> None:
    hooks = [hook for kind in kinds for hook in (getattr(owner, kind, None) or {}).values()]
    # The simulated ranks' ledger looks on at each parameter, and will at the part's.
    if any(not str(getattr(h, "__module__", "")).startswith(LEDGER) for h in hooks):
        raise ValueError(
            f"{where}: expected no hooks, got some: they would see a part of what they saw; "
            "register them on the divided model"
        )


def _names(model: nn.Module) -> set[str]:
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    return {name for name, _ in (*named, *model.named_buffers(remove_duplicate=False))}
