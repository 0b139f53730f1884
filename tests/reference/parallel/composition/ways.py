"""Techniques, each as: how a model is taken over, how a step is run, what is whole afterwards."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from reference.attention import scaled_dot_product_attention
from reference.parallel.context import ContextParallel
from reference.parallel.data_parallel import DDP, load_replica, save_replica, token_mean
from reference.parallel.pipeline import (
    Pipeline,
    one_f_one_b,
    recompute,
    recomputed,
    split_llama,
    sum_tied_gradients,
    zero_bubble_h1,
)
from reference.parallel.tensor import clip_grad_norm, parallelize, vocab_parallel_cross_entropy
from reference.parallel.zero import FSDP, Zero, clip_shards, load_sharded, save_sharded
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
    """AdamW as the feature groups it; torch's, for our own has no options more."""
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


class Replicas(Way):
    starts_from_rank_0 = True

    def take_over(self, model):
        self.divide_rows(self.comm)
        forget(model.layers, self.feature.checkpointing)
        return DDP(model, self.comm, bucket_bytes=2000,
                   find_unused_parameters=bool(self.feature.has_probe))  # fmt: skip

    def not_yet(self):
        return self.taken.no_sync()


class Stage(Way):
    """ZeRO 1 and 2: gradients are seen as its optimizer sees them, piece by piece."""

    starts_from_rank_0 = True
    stage = 1

    def take_over(self, model):
        self.divide_rows(self.comm)
        forget(model.layers, self.feature.checkpointing)
        self.zero = Zero(model, self.comm, self.stage, partial(step_with, feature=self.feature),
                         bucket_bytes=2000)  # fmt: skip
        self.pieces = {}
        self.zero.optimizer.register_step_pre_hook(lambda *_: self._see())
        return model

    def make_optimizer(self):
        return self.zero.optimizer

    def clip(self, max_norm):
        self.zero.clip_grad_norm(max_norm)

    def update(self):
        self.zero.step()
        return {n: self.pieces.get(n) for n, _ in self.taken.named_parameters()}

    def save(self, folder):
        states = self.zero.full_optimizer_state()
        if self.comm.rank == 0:
            torch.save((self.taken.state_dict(), states), folder / "zero.pt")

    def load(self, folder):
        parameters, states = torch.load(folder / "zero.pt")
        self.taken.load_state_dict(parameters)
        self.zero.load_full_optimizer_state(states)

    def _see(self):
        self.pieces = {
            name: None if piece.grad is None else bucket.whole(i, piece.grad)
            for bucket in self.zero.buckets
            for i, (name, piece) in enumerate(bucket.pieces)
        }


class StageTwo(Stage):
    stage = 2


class Shards(Way):
    starts_from_rank_0 = True
    num_replicas = 1

    def take_over(self, model):
        self.divide_rows(self.comm)
        forget(model.layers, self.feature.checkpointing)
        mesh = self.comm.mesh(
            replicas=self.num_replicas, shards=self.comm.size // self.num_replicas
        )
        return FSDP(model, mesh.shards, model.layers,
                    replicas=mesh.replicas if self.num_replicas > 1 else None)  # fmt: skip

    def not_yet(self):
        return self.taken.no_sync()

    def clip(self, max_norm):
        self.taken.clip_grad_norm(max_norm)

    def gradients(self):
        return {n: None if p.grad is None else self._whole(p, p.grad)
                for n, p in self.taken.named_parameters()}  # fmt: skip

    def state(self):
        state = self.taken.full_state_dict()
        others = {n: b.clone() for n, b in self.taken.named_buffers() if n not in state}
        return state | others

    def save(self, folder):
        save_sharded(folder / "shards", self.taken, self.optimizer, step=1)

    def load(self, folder):
        assert load_sharded(folder / "shards", self.taken, self.optimizer) == 1

    def _whole(self, parameter, rows):
        """From torch.chunk's parts along dimension 0, each padded to travel."""
        comm, shape = self.taken.comm, parameter.whole_shape
        per_rank = -(-shape[0] // comm.size)
        padded = rows.new_zeros(per_rank, *shape[1:])
        padded[: len(rows)] = rows
        return comm.all_gather(padded)[: shape[0]]


class HybridShards(Shards):
    num_replicas = 2


class Divided(Way):
    """Of whose checkpoints the weights alone are whole: an optimizer begins anew."""

    def prepare(self, model, folder):
        model.load_state_dict(
            {n: t for f in sorted(folder.iterdir()) for n, t in torch.load(f).items()}
        )

    def save(self, folder):
        torch.save(self.state(), folder / f"{self.comm.rank}.pt")

    def load(self, folder):
        pass


class Tensors(Divided):
    sequence_parallel = False

    def take_over(self, model):
        part = parallelize(model, self.comm, sequence_parallel=self.sequence_parallel)
        forget(part.layers, self.feature.checkpointing)
        return part

    def losses(self, tokens, targets):
        logits = self.taken(tokens, attend=kernel(self.feature))
        return vocab_parallel_cross_entropy(logits, targets, self.comm)

    def clip(self, max_norm):
        clip_grad_norm(self.taken, max_norm, self.comm)

    def gradients(self):
        found = {name: None for name, _ in self.taken.named_parameters()}
        return found | self.taken.whole(lambda p: p.grad)

    def state(self):
        return self.taken.full_state_dict()


class TensorsInSequence(Tensors):
    sequence_parallel = True


class Positions(Way):
    num_ulysses = 1

    def take_over(self, model):
        self.context = ContextParallel(self.comm, num_ulysses=self.num_ulysses)
        self.token_groups = (self.comm,)
        forget(model.layers, self.feature.checkpointing)
        self.context.attend = kernel(self.feature, self.context.attend)
        return model

    def my(self, texts):
        return self.context.part(texts)

    def losses(self, tokens, targets):
        return losses_of(self.context.logits(self.taken, tokens), targets)

    def after_backward(self):
        self.context.sum_gradients(self.taken.parameters())


class Heads(Positions):
    num_ulysses = 2


class Stages(Divided):
    """A pipeline of two stages; both have all tokens."""

    num_micro = 2
    schedule = staticmethod(one_f_one_b)

    def take_over(self, model):
        kind = self.feature.checkpointing
        forget(model.layers, "torch" if kind == "torch" else None)
        ours = kind if kind in ("full", "selective") else "none"
        stages = split_llama(model, self.comm.rank, self.comm.size, recompute=ours)
        schedule = self.schedule(self.comm.size, self.num_micro)
        self.pipeline = Pipeline(self.comm, stages, schedule, losses_of)
        return stages[0].model

    def run(self, tokens, targets, mean):
        loss = self.pipeline.step(tokens, targets, mean)
        return torch.zeros(()) if loss is None else loss

    def loss_groups(self):
        return (self.comm,)

    def after_backward(self):
        sum_tied_gradients(self.comm, self.pipeline.stages)

    def clip(self, max_norm):
        """The pipeline's own groups are the caller's: squares are summed over stages."""
        clip_shards([p.grad for p in self.taken.parameters() if p.grad is not None], max_norm,
                    self.comm)  # fmt: skip


class DeferredStages(Stages):
    schedule = staticmethod(zero_bubble_h1)


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
