"""A technique is: how a model is taken over, how a step is run, what is whole afterwards."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from reference.attention import scaled_dot_product_attention
from reference.parallel.data_parallel import load_replica, save_replica, token_mean
from reference.parallel.pipeline import recompute, recomputed
from reference.transformer.optimizer import clip_gradients, decay_groups
from tests.reference.parallel.composition import workload
from tests.reference.parallel.composition.workload import ADAMW, DECAY


def forget(layers, kind):
    """Let layers keep their inputs alone, by ours or by torch's."""
    for layer in layers:
        if kind == "full":
            layer.forward = partial(recompute, layer.forward)
        if kind == "torch":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def kernel(feature, attend=scaled_dot_product_attention):
    """Attention that forgets, or that casts as torch's kernel does under autocast."""
    if feature.checkpointing == "selective":
        return recomputed(attend)
    if feature.is_autocast:
        return lambda q, k, v, mask=None: attend(*(x.bfloat16() for x in (q, k, v)), mask)
    return attend


def losses_of(logits, targets):
    wide = logits.float().flatten(0, 1)
    return F.cross_entropy(wide, targets.flatten(), reduction="none").view(targets.shape)


def step_with(named, feature):
    """torch's AdamW, with parameters grouped as the feature has it."""
    groups = decay_groups(named, 3.0) if feature.has_groups else list(named)
    return torch.optim.AdamW(groups, weight_decay=DECAY, **ADAMW)


class Way:
    """One rank of a technique: `model` is what it was given, `taken` what took it over.

    `token_groups` divide a step's tokens, and `averaged_by` ranks average gradients afterwards.
    `num_parts` divide rows, of which this rank has `part`.
    """

    starts_from_rank_0 = False

    def __init__(self, comm, model, feature, folder=None):
        self.comm, self.feature = comm, feature
        self.token_groups, self.averaged_by, self.num_parts, self.part = (), 1, 1, 0
        if folder is not None:
            self.prepare(model, folder)
        self.taken = self.take_over(model)
        self.optimizer = self.make_optimizer()
        if folder is not None:
            self.load(folder)

    def take_over(self, model):
        """The wrapper; sets what divides the tokens."""
        raise NotImplementedError

    def make_optimizer(self):
        return step_with(self.taken.named_parameters(), self.feature)

    def divide_rows(self, comm):
        self.token_groups, self.averaged_by = (comm,), comm.size
        self.num_parts, self.part = comm.size, comm.rank

    def loss_groups(self):
        """Over which the shares of the loss add up."""
        return self.token_groups

    def my(self, texts):
        return texts.chunk(self.num_parts)[self.part]

    def run(self, tokens, targets, mean):
        """Forward and backward; this rank's share of the loss."""
        losses = self.losses(tokens, targets)
        share = mean.share(losses, targets)
        share.backward()
        return share.detach()

    def losses(self, tokens, targets):
        return losses_of(self.taken(tokens, attend=kernel(self.feature)), targets)

    def not_yet(self):
        """Passes whose gradients wait for a later one's."""
        return nullcontext()

    def after_backward(self):
        pass

    def clip(self, max_norm):
        clip_gradients(self.taken.parameters(), max_norm)

    def gradients(self):
        """Whole, by name, None where there is none; called before the optimizer's step."""
        named = self.taken.named_parameters()
        return {name: None if p.grad is None else p.grad.clone() for name, p in named}

    def update(self):
        """The gradients that the optimizer sees, gathered; then its step."""
        found = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def kinds(self):
        return workload.kinds_of(self.taken)

    def prepare(self, model, folder):
        """The model as it was saved, where it has to be loaded before it is taken over."""

    def save(self, folder):
        save_replica(self.comm, folder / "replica.pt", self.taken, self.optimizer, 1)

    def load(self, folder):
        assert load_replica(self.comm, folder / "replica.pt", self.taken, self.optimizer) == 1

    def state(self):
        return workload.state_of(self.taken)


def train(comm, way_of, feature, steps, folder, is_continued):
    """Some steps on one rank: its losses, whole gradients, kinds of parameters, whole state."""
    model = feature.model()
    if way_of.starts_from_rank_0 and comm.rank:
        _spoil(model)
    way = way_of(comm, model, feature, folder if is_continued else None)
    kinds = way.kinds()
    torch.manual_seed(workload.SEED + way.part)
    losses, gradients = [], []
    for step in steps:
        losses.append(_step(way, step))
        gradients.append(way.update())
    if folder is not None and not is_continued:
        way.save(folder)
    return {"losses": losses, "gradients": gradients, "kinds": kinds, "state": way.state()}


def _step(way, step):
    """Gradients of one, clipped; the loss of all ranks."""
    micros = [(way.my(x), way.my(t)) for x, t in workload.micro_batches(step, way.feature)]
    targets = torch.cat([t.flatten() for _, t in micros])
    mean = token_mean(targets, *way.token_groups, averaged_by=way.averaged_by)
    loss = torch.stack([_micro(way, step, i, micros, mean) for i in range(len(micros))]).sum()
    way.after_backward()
    if way.feature.max_norm is not None:
        way.clip(way.feature.max_norm)
    for group in way.loss_groups():
        group.all_reduce(loss)
    return loss / way.averaged_by


def _micro(way, step, number, micros, mean):
    tokens, targets = micros[number]
    workload.use_spare(way.taken, way.feature, step, number, way.part)
    waits = way.not_yet() if number + 1 < len(micros) else nullcontext()
    with waits, torch.autocast("cpu", torch.bfloat16, enabled=way.feature.is_autocast):
        return way.run(tokens, targets, mean)


@torch.no_grad()
def _spoil(model):
    """What rank 0 has is to be everybody's."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.add_(1)
