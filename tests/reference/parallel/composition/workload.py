"""A small Llama, a batch of texts, and one rank that trains on them: the truth for all."""

import dataclasses

import torch
import torch.nn.functional as F

from reference.attention import scaled_dot_product_attention as _attention
from reference.normalization import RMSNorm
from reference.transformer import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16
)
ROWS, SEQ_LEN, NUM_STEPS, SEED = 8, 8, 2, 40
# Large beside the rounding of a gradient: Adam's first steps are else the gradient's sign.
ADAMW = {"lr": 1e-2, "eps": 1e-2}
DECAY = 0.1


class ProbedNorm(RMSNorm):
    """A norm with two constant buffers, and a bias that a step uses or does not."""

    def __init__(self, layer):
        super().__init__(CONFIG.dim, eps=layer.eps)
        self.spare = torch.nn.Parameter(torch.linspace(-0.5, 0.5, CONFIG.dim))
        self.register_buffer("gain", torch.linspace(0.5, 1.5, CONFIG.dim))
        self.register_buffer("turn", torch.tensor([3]), persistent=False)
        self.is_used = False

    def forward(self, x):
        y = super().forward(x) * self.gain.roll(int(self.turn)).to(x.dtype)
        return y + self.spare if self.is_used else y


def fresh(**changes):
    torch.manual_seed(SEED)
    return Llama(dataclasses.replace(CONFIG, **changes))


def probed():
    model = fresh()
    model.norm = ProbedNorm(model.norm)
    return model


def texts(step, has_holes):
    """Tokens and targets; with holes each row has another number of targets that count."""
    generator = torch.Generator().manual_seed(SEED + step)
    tokens = torch.randint(0, CONFIG.vocab_size, (ROWS, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if has_holes:
        for row in range(ROWS):
            targets[row, 1 + (3 * row) % SEQ_LEN :] = -100
    return tokens[:, :-1].contiguous(), targets


def micro_batches(step, feature):
    """Each of them has rows of all ranks."""
    tokens, targets = texts(step, feature.has_holes)
    return list(zip(tokens.chunk(feature.num_micro), targets.chunk(feature.num_micro), strict=True))


def use_spare(model, feature, step, micro, part):
    for module in model.modules():
        if isinstance(module, ProbedNorm):
            module.is_used = (step, micro, part) in feature.used


def by_dimensions(named):
    """Matrices decay, vectors do not."""
    matrices = [p for _, p in named if p.requires_grad and p.ndim >= 2]
    vectors = [p for _, p in named if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": 3.0}, {"params": vectors, "weight_decay": 0.0}]


def one_rank(feature, num_parts, is_anew):
    """What `train` of ways.py returns, by plain torch; rows go through the model in as many parts
    as there are ranks that divide them, each with random numbers of its own. `is_anew`: with a new
    optimizer in each step."""
    model = feature.model()
    named = list(model.named_parameters())
    groups = by_dimensions(named) if feature.has_groups else [p for _, p in named]
    streams = [torch.Generator().manual_seed(SEED + part).get_state() for part in range(num_parts)]
    truth = {"losses": [], "gradients": [], "start": state_of(model), "kinds": kinds_of(model)}
    for step in range(NUM_STEPS):
        if step == 0 or is_anew:
            optimizer = torch.optim.AdamW(groups, weight_decay=DECAY, **ADAMW)
        truth["losses"].append(_gradients(model, feature, step, streams, num_parts))
        if feature.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), feature.max_norm)
        truth["gradients"].append({n: _copied(p.grad) for n, p in named})
        optimizer.step()
        optimizer.zero_grad()
    return truth | {"state": state_of(model)}


def _copied(gradient):
    return None if gradient is None else gradient.clone()


def _gradients(model, feature, step, streams, num_parts):
    """Left in the model, of the mean over all targets that count; the loss."""
    micros = micro_batches(step, feature)
    count = sum(int((targets != -100).sum()) for _, targets in micros)
    total = torch.zeros(())
    for micro, (tokens, targets) in enumerate(micros):
        parts = zip(tokens.chunk(num_parts), targets.chunk(num_parts), strict=True)
        for part, (x, t) in enumerate(parts):
            use_spare(model, feature, step, micro, part)
            torch.set_rng_state(streams[part])
            with torch.autocast("cpu", torch.bfloat16, enabled=feature.is_autocast):
                logits = model(x, attend=_in_bfloat16 if feature.is_autocast else _attention)
            loss = F.cross_entropy(logits.float().flatten(0, 1), t.flatten(), reduction="sum")
            (loss / count).backward()
            streams[part] = torch.get_rng_state()
            total += loss.detach() / count
    return total


def _in_bfloat16(q, k, v, mask):
    return _attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)


def state_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def kinds_of(model):
    """By name: dtype, requires_grad, and which names are one parameter."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        name: (p.dtype, p.requires_grad, tuple(sorted(n for n, q in named if q is p)))
        for name, p in named
    }
