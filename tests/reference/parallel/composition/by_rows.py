"""Techniques that divide the rows of a batch: DDP, ZeRO, FSDP and hybrid FSDP."""

from functools import partial

import torch

from reference.parallel.data_parallel import DDP
from reference.parallel.zero import FSDP, Zero, load_sharded, save_sharded
from tests.reference.parallel.composition.ways import Way, forget, step_with


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
