"""Techniques that divide the model or the text: tensor, context and pipeline parallelism."""

import torch

from reference.parallel.context import ContextParallel
from reference.parallel.pipeline import (
    Pipeline,
    one_f_one_b,
    split_llama,
    sum_tied_gradients,
    zero_bubble_h1,
)
from reference.parallel.tensor import clip_grad_norm, parallelize, vocab_parallel_cross_entropy
from reference.parallel.zero import clip_shards
from tests.reference.parallel.composition.ways import Way, forget, kernel, losses_of


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
