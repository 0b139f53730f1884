"""Fine-tuning a few numbers: LoRA and its relatives.

layer       A and B beside a frozen matrix; merging; many adapters in one batch
adapt       adapters on a whole model: add, switch, merge, take off
files       as peft stores them
prompts     prefix tuning, prompt tuning, P-tuning
bottleneck  Houlsby's adapters
galore      full weights with a low-rank optimizer, and updates inside backward
cost        parameters, optimizer bytes, FLOPs

Letters: D input and F output width, r rank, L layers, p prompt tokens.
"""

from reference.lora.adapt import (
    adapter_names,
    add_adapter,
    lora_layers,
    merge,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
    use_rows,
)
from reference.lora.bottleneck import Bottleneck, add_bottlenecks
from reference.lora.cost import (
    adam_bytes,
    adapter_flops,
    galore_bytes,
    lora_flops,
    lora_parameters,
    optimizer_state_bytes,
)
from reference.lora.files import load_adapter, save_adapter
from reference.lora.galore import (
    GaLoreAdamW,
    project,
    project_back,
    projection,
    update_in_backward,
)
from reference.lora.layer import Adapter, LoRAConfig, LoRALinear, lora_delta
from reference.lora.prompts import PrefixCache, PrefixTuning, PromptTuning

__all__ = [
    "Adapter",
    "Bottleneck",
    "GaLoreAdamW",
    "LoRAConfig",
    "LoRALinear",
    "PrefixCache",
    "PrefixTuning",
    "PromptTuning",
    "adam_bytes",
    "adapter_flops",
    "adapter_names",
    "add_adapter",
    "add_bottlenecks",
    "galore_bytes",
    "load_adapter",
    "lora_delta",
    "lora_flops",
    "lora_layers",
    "lora_parameters",
    "merge",
    "optimizer_state_bytes",
    "project",
    "project_back",
    "projection",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
    "update_in_backward",
    "use_rows",
]
