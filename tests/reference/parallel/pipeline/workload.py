"""A small Llama on random tokens; one rank on the whole batch is the truth for all pipelines."""

import dataclasses

import torch
import torch.nn.functional as F

from reference.parallel.pipeline import (
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
)
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32, dim=16, hidden_dim=24, num_layers=4, num_heads=4, num_kv_heads=2, max_seq_len=16
)
SCHEDULES = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "interleaved": lambda p, m: interleaved(p, m, 2),
    "ZB-H1": zero_bubble_h1,
}


def fresh(**changes):
    torch.manual_seed(5)
    return Llama(dataclasses.replace(CONFIG, **changes))


def batch(rows=8, seq_len=8):
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, CONFIG.vocab_size, (rows, seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def losses_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(module):
    """By name; stages' names are the model's."""
    return {name.removeprefix("model."): p.grad.clone() for name, p in module.named_parameters()}


def one_rank(**changes):
    """The loss and its gradients, from one forward of the whole batch."""
    model = fresh(**changes)
    tokens, targets = batch()
    loss = loss_of(model(tokens), targets)
    loss.backward()
    return loss.detach(), gradients(model)
