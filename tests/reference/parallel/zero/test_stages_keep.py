"""What ZeRO's first stages take over stays what it was, and a step's gradients belong to the step.

Oracle: the same model on one rank, on all rows. Reports of production: parameters without gradients
(DeepSpeed #777, #8506), decay groups of flat parameters (fairscale #697), passes that use different
parameters (pytorch #69031).
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.lora import LoRAConfig, add_adapter
from reference.parallel.ranks import run
from reference.parallel.tensor import parallelize
from reference.parallel.zero import FSDP, Zero, save_sharded
from reference.transformer.optimizer import AdamW, decay_groups
from tests.reference.parallel.zero.workload import adamw, batches, fresh, loss_of, rows_of

CLOSE = {"rtol": 2e-5, "atol": 4e-6}  # three AdamW steps, another order of sums
STAGES = pytest.mark.parametrize("stage", [0, 1, 2])


def grouped(named):
    return torch.optim.AdamW(decay_groups(named, 0.1), lr=1e-2)


def alone(model, make=grouped):
    optimizer = make(model.named_parameters())
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model.state_dict()


def trained(comm, stage, model, make=grouped, **options):
    zero = Zero(model, comm, stage, make, bucket_bytes=2000, **options)
    for batch in batches():
        loss_of(model, rows_of(comm, batch)).backward()
        zero.step()
    return {name: t.clone() for name, t in model.state_dict().items()}


def own_adamw(named):
    """The course's own optimizer takes named pieces and groups as torch's does."""
    return AdamW(decay_groups(named, 0.1), lr=1e-2)


@STAGES
@pytest.mark.parametrize("make", [grouped, own_adamw])
def test_decay_groups_match_one_rank(stage, make):
    truth = alone(fresh(), make)
    for ours in run(3, lambda comm: trained(comm, stage, fresh(), make)).results:
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)


@STAGES
def test_lora_matches_one_rank_and_starts_from_rank_0(stage):
    def adapted(seed=5):
        model = fresh()
        torch.manual_seed(seed)
        model = add_adapter(model, LoRAConfig(rank=2, alpha=4, targets=("q_proj", "down_proj")))
        model.register_buffer("offset", torch.full((2,), float(seed)))
        model.norm.weight.data.fill_(seed / 5)
        return model

    truth = alone(adapted())
    for ours in run(2, lambda comm: trained(comm, stage, adapted(5 + comm.rank))).results:
        assert ours.keys() == truth.keys()
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)


class Branches(nn.Module):
    """Layers of one shape, of which a pass names some."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x, *ways):
        for way in ways:
            x = torch.tanh(self.layers[way](x))
        return x


X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
# For each pass the layers that rank 0 and rank 1 use; nobody ever uses layer 3.
PASSES = [
    [((0, 1), (0, 1))],
    [((0, 1), (0, 2))],
    [((0, 1), (0, 2)), ((2,), (0, 1, 2))],
    [((0,), (0,)), ((1,), (1,)), ((0, 2), (0,))],
]


@STAGES
@pytest.mark.parametrize("bucket_bytes", [1, 250, 10**6])
@pytest.mark.parametrize("passes", PASSES)
def test_accumulation_with_a_changing_set_of_parameters(stage, bucket_bytes, passes):
    """Gradients are the sum of the passes, the mean of the ranks; who was used by nobody stays,
    weight decay or not, and nothing is left over for the next step."""

    def step(model, ranks, divisor):
        for i, ways in enumerate(passes):
            loss = sum(model(X[rank, i], *ways[rank]).square().sum() for rank in ranks)
            (loss / divisor).backward()

    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)

    truth = Branches()
    optimizer = make(truth.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        step(truth, (0, 1), 2)
        optimizer.step()

    def program(comm):
        model = Branches()
        zero = Zero(model, comm, stage, make, bucket_bytes=bucket_bytes)
        for _ in range(2):
            step(model, [comm.rank], 1)
            zero.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    for ours in run(2, program, is_measured=False).results:
        for name, parameter in truth.named_parameters():
            assert_close(ours[name], parameter.detach(), **CLOSE)
        assert torch.equal(ours["layers.3.weight"], Branches().layers[3].weight)


def test_rejects_parameters_that_begin_to_learn_later():
    def program(comm, wrap):
        model = fresh()
        model.embed_tokens.requires_grad_(False)
        wrap(model, comm)
        model.embed_tokens.requires_grad_(True)
        loss_of(model, rows_of(comm, batches()[0])).backward()
        return model

    def zero(model, comm):
        made = Zero(model, comm, 1, adamw)
        comm.step = made.step

    with pytest.raises(RuntimeError, match="embed_tokens.weight: requires a gradient now"):
        run(2, lambda comm: (program(comm, zero), comm.step()))


@STAGES
def test_optimizer_states_resume_on_another_number_of_ranks(stage):
    truth = alone(fresh())

    def steps(zero, model, comm, chosen):
        for batch in chosen:
            loss_of(model, rows_of(comm, batch)).backward()
            zero.step()

    def first(comm):
        model = fresh()
        zero = Zero(model, comm, stage, grouped, bucket_bytes=2000)
        steps(zero, model, comm, batches()[:2])
        return model.state_dict(), zero.full_optimizer_state()

    state, moments = run(2, first).results[0]
    assert moments["norm.weight"]["exp_avg"].shape == fresh().norm.weight.shape

    def second(comm):
        model = fresh()
        model.load_state_dict(state)
        zero = Zero(model, comm, stage, grouped, bucket_bytes=2000)
        zero.load_full_optimizer_state(moments)
        steps(zero, model, comm, batches()[2:])
        return {name: t.clone() for name, t in model.state_dict().items()}

    for ours in run(3, second).results:
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)

    def other(comm):
        Zero(fresh(num_layers=1), comm, stage).load_full_optimizer_state(moments)

    with pytest.raises(ValueError, match="states: expected those of 12 parameters, differs in"):
        run(2, other)


def test_rejects_what_is_sharded_already():
    def twice(comm):
        model = fresh()
        FSDP(model, comm, model.layers)
        Zero(model, comm, 1)

    with pytest.raises(ValueError, match="sharded already; wrap a model once"):
        run(2, twice)
    with pytest.raises(TypeError, match="model: expected an FSDP, got Llama; .* save_replica"):
        run(1, lambda comm: save_sharded("nowhere", fresh()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clips_by_the_whole_norm_under_tensor_parallelism(stage):
    """What tensor ranks hold alike counts once, what they divide as a whole (NeMo/RL #3788)."""
    alone = fresh(vocab_size=32)
    loss_of(alone, batches()[0]).backward()
    truth = nn.utils.clip_grad_norm_(alone.parameters(), 0.5)

    def program(comm):
        mesh = comm.mesh(dp=2, tp=2)
        part = parallelize(fresh(vocab_size=32), mesh.tp, gather_logits=True)
        rows = batches()[0].chunk(2)[mesh.dp.rank]
        if stage == 3:
            held = FSDP(part, mesh.dp, part.layers)
            loss_of(held, rows).backward()
        else:
            held = Zero(part, mesh.dp, stage, adamw)
            loss_of(part, rows).backward()
        with pytest.raises(ValueError, match="tensor: expected the group of tensor parallel"):
            held.clip_grad_norm(0.5)
        norm = held.clip_grad_norm(0.5, tensor=mesh.tp)
        return norm, held.clip_grad_norm(100.0, tensor=mesh.tp)

    for norm, after in run(4, program).results:
        assert_close(norm, truth, **CLOSE)
        assert_close(after, torch.tensor(0.5), rtol=1e-5, atol=0)
