"""A small Llama on a page of English, trained by one rank on all rows: the truth for all stages."""

import dataclasses

import torch
import torch.nn.functional as F

from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=31, dim=16, hidden_dim=20, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=16
)
NUM_STEPS = 3
ROWS = 12


def fresh(dtype=torch.float32, **changes):
    torch.manual_seed(3)
    return Llama(dataclasses.replace(CONFIG, **changes)).to(dtype)


def batches(rows=ROWS):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, CONFIG.vocab_size, (NUM_STEPS, rows, 9), generator=generator)


def rows_of(comm, batch):
    return batch.chunk(comm.size)[comm.rank]


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


def one_rank(max_norm=None, model=None):
    """Parameters by name after NUM_STEPS on all rows."""
    model = model or fresh()
    optimizer = adamw(model.parameters())
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}
