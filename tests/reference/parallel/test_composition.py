"""The composition fuzzer: random meshes of a tiny Llama against one rank on the whole batch.

Pipeline x data (ZeRO 0 to 2) x context (ring, gathered keys, Ulysses) x tensor (with and without
sequence parallelism), up to 16 ranks, any schedule and any recomputation; and replicas x shards
(ZeRO-3, HSDP) x context x tensor. Everything learns, or some is frozen, or LoRA; tied or not; with
weight decay of matrices or none; in one pass or two; texts of unequal lengths: the loss, each
gradient and each parameter after a step. One feature at a time is in composition/.
FUZZ_CASES in the environment asks for another number of cases; each has its number as its seed.
"""

import os
import random
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from reference.lora import LoRAConfig, add_adapter
from reference.parallel.context import ContextParallel
from reference.parallel.data_parallel import token_mean
from reference.parallel.pipeline import Pipeline, split_llama, sum_tied_gradients
from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.parallel.zero import FSDP, Zero
from reference.transformer.optimizer import decay_groups
from tests.reference.parallel.pipeline.workload import SCHEDULES, batch, fresh
from tests.tolerances import TOLERANCE

NUM_CASES = int(os.environ.get("FUZZ_CASES", "12"))
LAYERS = 8
SGD = {"lr": 0.5}


def draw(seed):
    """A layout that fits in 16 ranks."""
    rng = random.Random(seed)
    while True:
        pp, dp, cp, tp = (rng.choice((1, 2, 4)) for _ in range(4))
        if 1 < pp * dp * cp * tp <= (16 if cp == 1 else 8):  # rings of tiny tiles take long
            break
    name = rng.choice(list(SCHEDULES))
    return {
        "pp": pp, "dp": dp, "cp": cp, "tp": tp, "name": name,
        "num_micro": pp * rng.choice([r for r in (1, 2, 4) if pp * r * dp * cp <= 16]),
        "stage": rng.choice((0, 1, 2)),
        "sequence_parallel": tp > 1 and rng.random() < 0.5,
        "recompute": rng.choice(("none", "selective", "full")),
        "layout": rng.choice(("contiguous", "zigzag", "striped")),
        "keys": rng.choice(("ring", "gathered")),
        "num_ulysses": 2 if cp > 1 and tp < 4 and rng.random() < 0.4 else 1,
    } | draw_features(rng)  # fmt: skip


def draw_features(rng):
    """What is trained, and in how many passes."""
    return {
        "is_tied": rng.random() < 0.3,
        "learning": rng.choice(("all", "some", "LoRA")),
        "num_passes": rng.choice((1, 2)),
        "decay": rng.choice((0.0, 0.1)),
    }


def made(case):
    """The model that a case trains, the same on all ranks."""
    model = fresh(num_layers=LAYERS, is_tied=case["is_tied"])
    if case["learning"] == "some":
        model.layers[0].requires_grad_(False)  # with a pipeline nothing of a whole stage may learn
        model.layers[LAYERS - 1].mlp.requires_grad_(False)
    if case["learning"] == "LoRA":
        add_adapter(model, LoRAConfig(rank=2, alpha=4.0, targets="all-linear"))
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def optimizer_of(named, case):
    """Matrices decay and vectors do not."""
    return torch.optim.SGD(decay_groups(named, case["decay"]), **SGD)


def train(comm, case):
    """One step; this rank's whole parameters by name, gathered over tensor ranks."""
    mesh = comm.mesh(pp=case["pp"], dp=case["dp"], cp=case["cp"], tp=case["tp"])
    context = ContextParallel(mesh.cp, num_ulysses=case["num_ulysses"], layout=case["layout"],
                              keys=case["keys"])  # fmt: skip
    model = made(case)
    if case["tp"] > 1:
        model = parallelize(model, mesh.tp, sequence_parallel=case["sequence_parallel"])
    schedule = SCHEDULES[case["name"]](case["pp"], case["num_micro"])
    stages = split_llama(model, mesh.pp.rank, mesh.pp.size, recompute=case["recompute"],
                         num_chunks=schedule.num_chunks,
                         context=context if mesh.cp.size > 1 else None)  # fmt: skip
    holder = torch.nn.ModuleList(stages)
    pipeline = Pipeline(mesh.pp, stages, schedule, lambda y, t: losses_of(y, t, mesh.tp))
    tokens, targets = (context.part(t.chunk(case["dp"])[mesh.dp.rank]) for t in uneven_batch())
    replicas = mesh["dp", "cp"]  # over which Zero averages
    zero = Zero(holder, replicas, case["stage"], lambda named: optimizer_of(named, case),
                bucket_bytes=3000)  # fmt: skip
    mean = token_mean(targets, replicas, averaged_by=replicas.size)
    num_passes = case["num_passes"] if len(tokens) // 2 % case["num_micro"] == 0 else 1
    parts = zip(tokens.chunk(num_passes), targets.chunk(num_passes), strict=True)
    losses = [pipeline.step(x, t, mean) for x, t in parts]
    if case["stage"] < 2:
        sum_tied_gradients(mesh.pp, stages)
    zero.step()
    found = {}
    for stage in stages:
        found |= whole(stage.model)
    if losses[0] is None:
        return None, found
    return replicas.all_reduce(torch.stack(losses).sum(), "mean"), found


def uneven_batch():
    """Rows, and so ranks and micro-batches, with different numbers of tokens that count."""
    tokens, targets = batch(16)
    for row in range(16):
        targets[row, : row % 7] = -100
    targets[3] = -100
    return tokens, targets


def losses_of(logits, targets, tp):
    if tp.size > 1:
        return vocab_parallel_cross_entropy(logits, targets, tp)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )


def whole(model):
    if hasattr(model, "whole"):
        return {name: t.clone() for name, t in model.whole(lambda p: p).items()}
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def truth_of(case):
    """The loss and the parameters after a step of one rank on the whole batch."""
    model = made(case)
    tokens, targets = uneven_batch()
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": case["decay"]},
        {"params": [p for p in learning if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.SGD(groups, **SGD).step()
    return loss.detach(), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_matches_one_rank(seed):
    case = draw(seed)
    if case["is_tied"] and case["stage"] == 2:
        case["stage"] = 1  # stage 2 has sent the gradients before the copies' could be summed
    loss, truth = truth_of(case)
    world_size = case["pp"] * case["dp"] * case["cp"] * case["tp"]
    done = run(world_size, train, case, is_measured=False)
    names = set()
    for found_loss, found in done.results:
        names |= found.keys()
        if found_loss is not None:
            assert_close(found_loss, loss, **TOLERANCE[torch.float32], msg=str(case))
        for name in found:
            # The step has lr 0.5: the difference of weights is half that of gradients.
            assert_close(found[name], truth[name], **TOLERANCE[torch.float32],
                         msg=f"{name} in {case}")  # fmt: skip
    assert names == truth.keys()


def test_rejects_tied_embeddings_whose_gradients_stage_2_has_sent():
    def program(comm):
        mesh = comm.mesh(pp=2, dp=2)
        stages = split_llama(fresh(num_layers=LAYERS, is_tied=True), mesh.pp.rank, 2)
        Zero(torch.nn.ModuleList(stages), mesh.dp, 2, lambda p: torch.optim.SGD(p, **SGD))
        tokens, targets = (t.chunk(2)[mesh.dp.rank] for t in batch(16))

        def loss(y, t):
            return torch.nn.functional.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="none")

        Pipeline(mesh.pp, stages, SCHEDULES["1F1B"](2, 2), loss).step(tokens, targets)
        sum_tied_gradients(mesh.pp, stages)

    with pytest.raises(ValueError, match="use stage 1"):
        run(4, program, is_measured=False)


class InParts(torch.nn.Module):
    """A model of whose texts each rank of `context` has some positions."""

    def __init__(self, model, context):
        super().__init__()
        self.model, self._context = model, [context]

    def forward(self, tokens):
        return self._context[0].logits(self.model, tokens)


def draw_sharded(seed):
    """Axes of a layout with sharded parameters that fits in 16 ranks."""
    rng = random.Random(seed)
    while True:
        replicas, shards, cp, tp = (rng.choice((1, 2, 4)) for _ in range(4))
        if shards * cp > 1 and replicas * shards * cp * tp <= (16 if cp == 1 else 8):
            break
    return {
        "replicas": replicas, "shards": shards, "cp": cp, "tp": tp,
        "sequence_parallel": tp > 1 and rng.random() < 0.5,
        "layout": rng.choice(("contiguous", "zigzag", "striped")),
        "reshard": rng.random() < 0.5,
    } | draw_features(rng)  # fmt: skip


def train_sharded(comm, case):
    """One step under FSDP over shards and cp, copied over replicas (HSDP); whole parameters."""
    axes = {axis: case[axis] for axis in ("replicas", "shards", "cp", "tp")}
    mesh = comm.mesh(**axes)
    context = ContextParallel(mesh.cp, layout=case["layout"])
    model = made(case)
    if case["tp"] > 1:
        model = parallelize(model, mesh.tp, sequence_parallel=case["sequence_parallel"])
    inside = InParts(model, context)
    fsdp = FSDP(inside, mesh["shards", "cp"], model.layers,
                replicas=mesh.replicas if case["replicas"] > 1 else None,
                reshard_after_forward=case["reshard"])  # fmt: skip
    row = mesh.coordinates["replicas"] * case["shards"] + mesh.coordinates["shards"]
    num_rows = case["replicas"] * case["shards"]
    tokens, targets = (context.part(t.chunk(num_rows)[row]) for t in uneven_batch())
    everyone = mesh["replicas", "shards", "cp"]  # over whom FSDP averages
    mean = token_mean(targets, everyone, averaged_by=everyone.size)
    passes = [*zip(*(x.chunk(case["num_passes"]) for x in (tokens, targets)), strict=True)]
    loss = torch.zeros(())
    for number, (x, t) in enumerate(passes, 1):
        with fsdp.no_sync() if number < len(passes) else nullcontext():
            share = mean.share(losses_of(fsdp(x), t, mesh.tp), t)
            share.backward()
        loss += share.detach()
    optimizer_of(fsdp, case).step()
    whole_loss = everyone.all_reduce(loss, "mean")
    trained = made(case)
    if case["tp"] > 1:
        trained = parallelize(trained, mesh.tp, sequence_parallel=case["sequence_parallel"])
    state = {name.removeprefix("model."): t for name, t in fsdp.full_state_dict().items()}
    for name, parameter in trained.named_parameters():
        parameter.data.copy_(state[name])
    return whole_loss, whole(trained)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_CASES // 2))
def test_sharded_parameters_match_one_rank(seed):
    """ZeRO-3 and HSDP with tensor, sequence and context parallelism."""
    case = draw_sharded(seed)
    loss, truth = truth_of(case)
    world_size = case["replicas"] * case["shards"] * case["cp"] * case["tp"]
    done = run(world_size, train_sharded, case, is_measured=False)
    for found_loss, found in done.results:
        assert_close(found_loss, loss, **TOLERANCE[torch.float32], msg=str(case))
        assert found.keys() == truth.keys()
        for name in truth:
            assert_close(found[name], truth[name], **TOLERANCE[torch.float32],
                         msg=f"{name} in {case}")  # fmt: skip
