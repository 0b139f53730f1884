"""Training steps with LoRA beside peft's, on the same base with the same adapters.

The base is transformers' Llama in both cases, so that only the adapters differ: rank 8 on queries
and values, then on all linear layers. One step is forward, loss and backward.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from benchmarks.measure import Row, time_in_turns
from reference.lora import LoRAConfig, add_adapter, merge, trainable_parameters, use_rows
from reference.transformer import LlamaConfig, to_huggingface

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SHAPE = LlamaConfig(
    vocab_size=1024, dim=384, hidden_dim=1024, num_layers=6, num_heads=6, max_seq_len=256
)
BATCH, SEQ_LEN, RANK, ALPHA = 4, 128, 8, 16


def rows() -> list[Row]:
    torch.manual_seed(0)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, SEQ_LEN))
    found = []
    for what, targets in (("queries, values", ("q_proj", "v_proj")), ("all linear", "all-linear")):
        ours = _base()
        add_adapter(ours, LoRAConfig(rank=RANK, alpha=ALPHA, targets=targets))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                target_modules=targets if isinstance(targets, str) else list(targets),
            )
            theirs = peft.get_peft_model(_base(), config)
        parts = trainable_parameters(ours), trainable_parameters(theirs)
        times = time_in_turns(_step(ours, tokens, parts[0]), _step(theirs, tokens, parts[1]))
        found.append(Row(f"LoRA step, {what}", *times, "us"))
    return [*found, *_inference(tokens)]


def _base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(TheirConfig(**to_huggingface(SHAPE)))


def _step(model: Any, tokens: Tensor, parameters: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        torch.autograd.grad(loss, parameters)

    return step


def _inference(tokens: Tensor) -> list[Row]:
    """Merged adapters beside the bare base; each row its own adapter beside one for all rows."""
    base, merged, many = _base(), _base(), _base()
    config = LoRAConfig(rank=RANK, alpha=ALPHA, targets="all-linear")
    add_adapter(merged, config)
    merge(merged)
    for i in range(BATCH):
        add_adapter(many, config, f"user{i}")

    def forward(model: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return model(tokens, use_cache=False).logits

        return call

    one = time_in_turns(forward(merged), forward(base))
    with use_rows(many, [f"user{i}" for i in range(BATCH)]):
        batched = time_in_turns(forward(many), forward(base))
    return [
        Row("inference, merged; bare base", *one, "us"),
        Row("inference, an adapter a row; bare base", *batched, "us"),
    ]
