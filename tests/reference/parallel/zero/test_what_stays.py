"""What FSDP takes over stays what it was, and a step's gradients belong to the step.

Oracle: the same model on one rank, on all rows; torch's fully_shard on gloo. All of it has gone
wrong in production: frozen parameters in a unit (pytorch #104690, peft #1702), tied weights (verl
#7834, torchtune #616), decay groups (fairscale #697, pytorch #101343), passes that use different
parameters (pytorch #69031), two forwards before a backward (pytorch #136861, fairscale #918),
checkpoints (fairscale #777).
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from reference.lora import LoRAConfig, add_adapter
from reference.parallel.data_parallel import DDP
from reference.parallel.ranks import CollectiveMismatch, run
from reference.parallel.zero import FSDP, load_sharded, save_sharded
from reference.transformer.optimizer import clip_gradients, decay_groups
from tests.reference.parallel.zero.workload import adamw, batches, fresh, loss_of, rows_of
from tests.tolerances import TOLERANCE

CLOSE = {"rtol": 2e-5, "atol": 4e-6}  # as test_fsdp: three AdamW steps, another order of sums


def adapted():
    torch.manual_seed(5)
    model = add_adapter(fresh(), LoRAConfig(rank=2, alpha=4, targets=("q_proj", "down_proj")))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def trained(model, comm=None, wrap=None, groups=False):
    """State after three steps; alone on all rows, or on a rank's."""
    held = model if wrap is None else wrap(model, comm)
    parameters = decay_groups(held, 0.1) if groups else held.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(held, batch if comm is None else rows_of(comm, batch)).backward()
        optimizer.step()
    moved = len(optimizer.state)
    return moved, held.full_state_dict() if isinstance(held, FSDP) else held.state_dict()


def by_layer(model, comm):
    return FSDP(model, comm, model.layers)


def hybrid(model, comm):
    mesh = comm.mesh(replicas=2, shards=comm.size // 2)
    return FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)


@pytest.mark.parametrize("world_size, wrap", [(3, by_layer), (4, hybrid)])
def test_lora_matches_one_rank_and_leaves_the_base_alone(world_size, wrap):
    before = adapted().state_dict()
    num_moved, truth = trained(adapted())
    for moved, ours in run(world_size, lambda c: trained(adapted(), c, wrap)).results:
        assert moved == num_moved == 12  # A and B of two matrices in three layers
        assert ours.keys() == truth.keys()
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)
            assert ("adapters" in name) != torch.equal(ours[name], before[name])


def test_frozen_parameters_are_gathered_and_not_reduced():
    def program(comm, frozen):
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
        for i in frozen:
            model[i].requires_grad_(False)
        fsdp = FSDP(model, comm, model)
        comm.traffic.reset()
        fsdp(torch.ones(2, 8, requires_grad=True)).sum().backward()
        calls = comm.traffic.total(operation="reduce_scatter").num_calls
        return calls, [p.grad is None for p in fsdp.parameters()]

    assert run(2, program, []).results[0] == (4, [False] * 4)
    assert run(2, program, [1, 2]).results[1] == (2, [False, True, True, False])


@pytest.mark.parametrize("frozen", [(), ("embed_tokens",), ("layers.1",), ("norm", "lm_head")])
def test_partly_frozen_models_match_one_rank(frozen):
    def model():
        made = fresh()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        return made

    num_moved, truth = trained(model())
    for moved, ours in run(2, lambda c: trained(model(), c, by_layer)).results:
        assert moved == num_moved
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)


class Tied(nn.Module):
    """Two units that share a weight, a buffer, and a parameter that nobody reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head.weight = self.embed.weight
        self.idle = nn.Linear(3, 3)

    def forward(self, tokens):
        return self.head(self.middle(self.embed(tokens)))


def test_a_weight_that_two_units_share_stays_one():
    tokens = torch.arange(8)

    def step(model, rows):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows), rows).backward()
            optimizer.step()

    alone = Tied().double()
    alone.middle[1].eval()  # the statistics of all rows are another matter: SyncBatchNorm
    step(alone, tokens)

    def program(comm):
        model = Tied().double()
        model.middle[1].eval()
        model.middle[1].running_mean += comm.rank
        fsdp = FSDP(model, comm, [model.embed, model.middle, model.head])
        assert model.embed.weight is model.head.weight
        step(fsdp, tokens.chunk(comm.size)[comm.rank])
        assert model.embed.weight is model.head.weight
        assert model.idle.weight.grad is None
        return fsdp.full_state_dict(), [n for n, _ in fsdp.named_parameters()]

    for ours, names in run(2, program).results:
        assert ours.keys() == alone.state_dict().keys()
        assert names == [name for name, _ in alone.named_parameters()]
        for name, truth in alone.state_dict().items():
            assert_close(ours[name], truth)  # also the buffers, which are rank 0's


def test_names_shapes_dtypes_and_decay_groups_are_the_models():
    def program(comm):
        model = adapted().bfloat16()
        model.norm.float()
        before = list(model.named_parameters())
        shapes = [p.shape for _, p in before]
        first = copy.deepcopy(model.state_dict())
        fsdp = by_layer(model, comm)
        for (name, was), shape, (other, now) in zip(
            before, shapes, fsdp.named_parameters(), strict=True
        ):
            assert name == other and now is was and now.requires_grad == was.requires_grad
            assert now.whole_shape == shape and now.ndim == len(shape)
            assert now.shape[0] == len(torch.arange(shape[0]).chunk(comm.size)[comm.rank])
        sizes = [len(group["params"]) for group in decay_groups(fsdp, 0.1)]
        whole = fsdp.full_state_dict()
        assert all(torch.equal(whole[n], t) and whole[n].dtype == t.dtype for n, t in first.items())
        assert list(fsdp.state_dict()) == list(first)
        return sizes

    expected = [len(group["params"]) for group in decay_groups(adapted(), 0.1)]
    assert run(2, program).results == [expected] * 2


def test_a_whole_state_is_loaded_from_the_meta_device():
    state = Tied().state_dict()

    def program(comm):
        with torch.device("meta"):
            model = Tied()
            model.middle[1].to_empty(device="cpu")  # buffers are not sharded
        fsdp = FSDP(model, comm, [model.middle])
        fsdp.load_full_state_dict(state)
        wrong = {**state, "head.weight": state["head.weight"][:3]}
        with pytest.raises(ValueError, match=r"differs in \['head.weight'\]"):
            fsdp.load_full_state_dict(wrong)
        return fsdp.full_state_dict()

    for ours in run(3, program).results:
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())


def test_decay_groups_match_one_rank():
    _, truth = trained(fresh(), groups=True)
    for _, ours in run(4, lambda c: trained(fresh(), c, by_layer, groups=True)).results:
        for name in truth:
            assert_close(ours[name], truth[name], **CLOSE)


def test_an_optimizer_made_before_sharding_still_trains():
    def program(comm):
        model = fresh()
        optimizer = adamw(model.parameters())
        fsdp = by_layer(model, comm)
        for batch in batches():
            optimizer.zero_grad()
            loss_of(fsdp, rows_of(comm, batch)).backward()
            optimizer.step()
        return fsdp.full_state_dict()

    _, truth = trained(fresh())
    ours = run(2, program).results[0]
    for name in truth:
        assert_close(ours[name], truth[name], **CLOSE)


class Branches(nn.Module):
    """Layers that a pass names."""

    def __init__(self, num=4):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(num))

    def forward(self, x, *ways):
        for way in ways:
            x = torch.tanh(self.layers[way](x))
        return x


X = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def accumulated(model, passes, no_sync, x):
    """Gradients of a step of several passes, the last of which reduces; twice, to see leftovers."""
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        for i, ways in enumerate(passes):
            last = i + 1 == len(passes)
            with no_sync(not last):
                (model(x[i], *ways).square().mean() / len(passes)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def one_rank_gradients(passes, num_ranks=2):
    model = Branches().double()
    for i, ways in enumerate(passes):
        rows = X[:num_ranks, i].flatten(0, 1)
        (model(rows, *ways).square().mean() / len(passes)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


PASSES = [
    [(0, 1, 2, 3)],
    [(0, 1), (2, 3)],  # the last pass reaches nothing of what the first has
    [(0, 1, 2), (1,), (1, 2)],
    [(0, 0, 1), (2, 0)],  # a unit twice in a pass
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("how", ["fsdp", "hybrid", "ddp"])
def test_accumulation_belongs_to_the_step(passes, how):
    import contextlib

    def program(comm):
        model = Branches().double()
        if how == "ddp":
            held = DDP(model, comm, find_unused_parameters=True)
        elif how == "fsdp":
            held = FSDP(model, comm, model.layers)
        else:
            mesh = comm.mesh(replicas=2, shards=1)
            held = FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)

        def no_sync(on):
            return held.no_sync() if on else contextlib.nullcontext()

        return accumulated(held, passes, no_sync, X[comm.rank])

    truth = one_rank_gradients(passes)
    ranks = run(2, program).results
    for name, expected in truth.items():
        found = [rank[name] for rank in ranks]
        if expected is None:
            assert found == [None, None], name
        elif how == "fsdp":
            assert_close(torch.cat(found), expected)
        else:
            assert all(torch.equal(f, found[0]) for f in found)
            assert_close(found[0], expected)


def test_summands_share_a_gradient_and_not_their_sums():
    """Autograd hands one tensor to both: accumulating in place would count it twice."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return ((self.a + self.b) * x).sum()

    def program(comm):
        fsdp = FSDP(Sum(), comm)
        for x in (1.0, 10.0):
            with fsdp.no_sync():
                fsdp(x).backward()
        fsdp(100.0).backward()
        return [p.grad.tolist() for p in fsdp.parameters()]

    assert run(2, program).results == [[[111.0] * 2] * 2] * 2


def test_a_parameter_that_one_rank_used_gets_the_mean():
    """The other ranks' share is zero; where nobody used it, there is no gradient and no decay."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.idle = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, is_left):
            return (self.left if is_left else self.right)(x)

    def program(comm):
        fsdp = FSDP(Shared(), comm)
        fsdp(torch.ones(1, 4), comm.rank == 0).sum().backward()
        return [p.grad for p in fsdp.parameters()]

    first, second = run(2, program).results
    left, right = torch.cat([first[0], second[0]]), torch.cat([first[2], second[2]])
    assert left.eq(0.5).all() and right.eq(0.5).all()
    assert first[4] is None and second[5] is None


def test_a_branch_whose_gradient_one_rank_drops_is_no_mix_up_of_layers():
    """Units of one shape: reductions in the order of arrival would add layer 1 to layer 2."""
    x = X[:, 0]

    def loss(model, rows, drops):
        a, b = model(rows, 0), model(rows, 1, 2)
        return ((a.detach() if drops else a) + 2 * (b if not drops else b * 3)).mean()

    alone = Branches().double()
    sum(loss(alone, x[r], r == 1) for r in range(2)).div(2).backward()

    def program(comm):
        model = Branches().double()
        fsdp = FSDP(model, comm, model.layers)
        loss(fsdp, x[comm.rank], comm.rank == 1).backward()
        return [p.grad for p in fsdp.parameters()]

    ranks = run(2, program).results
    for i, parameter in enumerate(alone.parameters()):
        if parameter.grad is None:
            assert ranks[0][i] is None
        else:
            assert_close(torch.cat([ranks[0][i], ranks[1][i]]), parameter.grad)


@pytest.mark.parametrize("backend", ["simulated", "processes"])
def test_rejects_another_layer_on_another_rank(backend):
    """Layers of one shape: half of one and half of the other would make a matrix, too."""

    def program(comm):
        model = Branches()
        FSDP(model, comm, model.layers)(torch.ones(2, 5), comm.rank)

    with pytest.raises(CollectiveMismatch, match=r"disagree about the contents(.|\n)*layers.1"):
        run(2, program, backend=backend)


def test_two_forwards_before_one_backward_match_one_rank():
    x = X[:, 0]

    def loss(model, rows):
        return (model(rows, 0, 1) * model(rows + 1, 1, 2)).mean()

    alone = Branches().double()
    sum(loss(alone, rows) for rows in x).div(2).backward()

    def program(comm, wrap):
        model = Branches().double()
        held = wrap(model, comm)
        for _ in range(2):
            held.zero_grad()
            loss(held, x[comm.rank]).backward()
        return [p.grad for p in held.parameters()]

    def ddp(model, comm):
        return DDP(model, comm, find_unused_parameters=True, bucket_bytes=1)

    sharded, whole = run(2, program, by_layer).results, run(2, program, ddp).results
    for i, parameter in enumerate(alone.parameters()):
        if parameter.grad is None:
            assert sharded[0][i] is whole[0][i] is None
        else:
            assert_close(torch.cat([sharded[0][i], sharded[1][i]]), parameter.grad)
            assert_close(whole[0][i], parameter.grad)


def test_gathered_values_do_not_outlive_a_step():
    """A forward with gradients and no backward, then a step: the next one sees new values."""

    def program(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers, reshard_after_forward=False)
        rows = rows_of(comm, batches()[0])
        loss_of(fsdp, rows)
        with torch.no_grad():
            for p in fsdp.parameters():
                p.mul_(0.5)
        return loss_of(fsdp, rows).item()

    model = fresh()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    truth = [loss_of(model, rows).item() for rows in batches()[0].chunk(2)]
    assert run(2, program).results == pytest.approx(truth, rel=1e-6)


class Checkpointed(nn.Module):
    """Blocks that are computed twice: `inside` their units, or units within what is forgotten."""

    def __init__(self, inside, reentrant):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 6))
            for _ in range(3)
        )
        if inside:
            for layer in self.layers:
                compute = layer.forward
                layer.forward = lambda x, f=compute: checkpoint(f, x, use_reentrant=reentrant)
        self.outside = None if inside is None or inside else reentrant

    def forward(self, x):
        for layer in self.layers:
            x = x + (
                checkpoint(layer, x, use_reentrant=self.outside)
                if self.outside is not None
                else layer(x)
            )
        return x


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compose(inside, reentrant):
    """Inside of units and around them, with and without a nested backward: the same gradients."""

    def program(comm, inside, reentrant):
        model = Checkpointed(inside, reentrant)
        fsdp = by_layer(model, comm)
        torch.manual_seed(comm.rank)
        x = X[comm.rank, 0, :, :4].float().repeat(1, 2)[:, :6].requires_grad_()
        fsdp(x).square().mean().backward()
        assert all(unit.wholes is None for unit in fsdp.units)
        return [p.grad for p in fsdp.parameters()] + [x.grad]

    truth = run(2, program, None, False).results
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its older autocast
        found = run(2, program, inside, reentrant).results
    for ours, theirs in zip(found, truth, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, **TOLERANCE[torch.float32])


def test_bytes_of_several_dtypes_travel_together():
    """A unit of bfloat16, float32, float64 and packed whole numbers, as 4-bit weights are."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.codes = nn.Parameter(torch.arange(15, dtype=torch.uint8).view(5, 3), False)
            self.scale = nn.Parameter(torch.randn(3))
            self.low = nn.Parameter(torch.randn(7, 3, dtype=torch.bfloat16))
            self.high = nn.Parameter(torch.randn(2, 3, dtype=torch.float64), False)

        def forward(self, x):
            return (self.codes * self.scale).sum() * (self.low.double() @ self.high.T).sum() * x

    alone = Packed()
    alone(3.0).backward()

    def program(comm):
        model = Packed()
        fsdp = FSDP(model, comm)
        comm.traffic.reset()
        fsdp(3.0).backward()
        calls = {op: comm.traffic.total(operation=op).num_calls
                 for op in ("all_gather", "reduce_scatter")}  # fmt: skip
        return fsdp.full_state_dict(), [p.grad for p in fsdp.parameters()], calls

    ranks = run(3, program).results
    for name, tensor in alone.state_dict().items():
        assert torch.equal(ranks[0][0][name], tensor)
    assert ranks[0][2] == {"all_gather": 1, "reduce_scatter": 1}
    assert ranks[0][1][0] is None and ranks[0][1][3] is None
    for i, parameter in ((1, alone.scale), (2, alone.low)):
        ours = torch.cat([rank[1][i] for rank in ranks])
        assert ours.dtype == parameter.dtype
        assert_close(ours, parameter.grad, **TOLERANCE[parameter.dtype])


def test_matches_fully_shard_with_frozen_and_uneven_parameters():
    """Local shards, gradients and values, on gloo: two ranks, so bit for bit."""

    def theirs(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mesh = init_device_mesh("cpu", (comm.size,))
            model = adapted()
            for block in model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            loss_of(model, rows_of(comm, batches()[0])).backward()
        return {
            n: (p.to_local().detach(), None if p.grad is None else p.grad.to_local())
            for n, p in model.named_parameters()
        }

    def program(comm):
        fsdp = by_layer(adapted(), comm)
        loss_of(fsdp, rows_of(comm, batches()[0])).backward()
        return theirs(comm), {n: (p.detach(), p.grad) for n, p in fsdp.named_parameters()}

    for truth, ours in run(2, program, backend="processes", is_measured=False).results:
        assert ours.keys() == truth.keys()
        for name, (value, gradient) in truth.items():
            assert torch.equal(ours[name][0], value)
            assert (gradient is None) == (ours[name][1] is None), name
            if gradient is not None:
                assert torch.equal(ours[name][1], gradient), name


@pytest.mark.parametrize("before, after", [(4, 3), (2, 5)])
def test_checkpoints_keep_frozen_and_idle_parameters_and_buffers(before, after, tmp_path):
    def start(comm):
        model = Tied()
        model.middle[0].requires_grad_(False)
        fsdp = FSDP(model, comm, [model.embed, model.middle, model.head])
        return fsdp, adamw(p for p in fsdp.parameters() if p.requires_grad)

    def first(comm):
        fsdp, optimizer = start(comm)
        fsdp(torch.arange(8)).sum().backward()
        optimizer.step()
        save_sharded(tmp_path / "step", fsdp, optimizer, step=1)
        return fsdp.full_state_dict()

    def second(comm):
        fsdp, optimizer = start(comm)
        load_sharded(tmp_path / "step", fsdp, optimizer)
        whole = fsdp.full_state_dict()
        moments = {
            n: optimizer.state[p] for n, p in fsdp.named_parameters() if p in optimizer.state
        }
        return whole, moments

    saved = run(before, first).results[0]
    ranks = run(after, second).results
    for whole, moments in ranks:
        assert all(torch.equal(whole[name], saved[name]) for name in saved)
        assert set(moments) == {"embed.weight", "middle.1.weight", "middle.1.bias"}
    assert sum(len(m["embed.weight"]["exp_avg"]) for _, m in ranks) == 11


def test_clipping_waits_for_what_no_sync_has_kept_back():
    def program(comm):
        fsdp = by_layer(fresh(), comm)
        with fsdp.no_sync():
            loss_of(fsdp, rows_of(comm, batches()[0])).backward()
        fsdp.clip_grad_norm(1.0)

    with pytest.raises(RuntimeError, match="wait unreduced since no_sync"):
        run(2, program)


def test_rejects_clipping_shards_one_by_one():
    def program(comm):
        fsdp = by_layer(fresh(), comm)
        loss_of(fsdp, rows_of(comm, batches()[0])).backward()
        clip_gradients(fsdp.parameters(), 1.0)

    with pytest.raises(ValueError, match="got shards; .* the wrapper's clip_grad_norm"):
        run(2, program)
