"""A tiny Llama in float64, its training on one rank and on several, for the tests here."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from reference.lora import lora_layers, trainable_parameters
from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16
)
TOKENS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64; sums of four ranks in another order, three steps


def fresh(dtype=torch.float64, **changes):
    """A model of which every parameter is drawn."""
    torch.manual_seed(1)
    model = Llama(dataclasses.replace(CONFIG, **changes)).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def learned(model):
    """Adapters as after some training: B is not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model):
            for adapter in layer.adapters.values():
                adapter.b.normal_(generator=generator, std=0.3)
    return model


def train(model, loss_of, steps=3):
    """The losses of some steps of AdamW on what learns."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(INPUTS))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean_loss(logits):
    return F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())


def train_one_rank(model, steps=3):
    """(losses, state dict) of a copy of the model."""
    model = copy.deepcopy(model)
    return train(model, mean_loss, steps), model.state_dict()


def train_ranks(model, world_size, *, steps=3, **options):
    """(losses, gathered state dict) of each rank."""

    def program(comm):
        part = parallelize(model, comm, **options)
        losses = train(part, lambda z: vocab_parallel_cross_entropy(z, TARGETS, comm).mean(), steps)
        return losses, part.full_state_dict()

    return run(world_size, program, is_measured=False).results
