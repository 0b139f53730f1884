"""Oracles: one rank on all rows; torch's fully_shard (FSDP2) on gloo, hybrid and mixed as well."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.parallel.ranks import CLASSROOM, run, run_one_rank
from reference.parallel.zero import (
    FSDP,
    MixedPrecision,
    elements_sent,
    load_sharded,
    model_states_bytes,
    save_sharded,
)
from reference.transformer import Llama, LlamaConfig
from tests.reference.parallel.zero.workload import (
    CONFIG,
    adamw,
    batches,
    fresh,
    loss_of,
    one_rank,
    rows_of,
)


def train(comm, *, max_norm=None, num_micro=1, model=None, **options):
    model = model or fresh()
    fsdp = FSDP(model, comm, model.layers, **options)
    optimizer = adamw(fsdp.parameters())
    for batch in batches():
        optimizer.zero_grad()
        micro = rows_of(comm, batch).chunk(num_micro)
        for rows in micro[:-1]:
            with fsdp.no_sync():
                (loss_of(fsdp, rows) / num_micro).backward()
        (loss_of(fsdp, micro[-1]) / num_micro).backward()
        if max_norm is not None:
            fsdp.clip_grad_norm(max_norm)
        optimizer.step()
    return fsdp.full_state_dict()


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name in truth:
        # Three AdamW steps from another order of summation: roundings of m and v add up, and
        # m / sqrt(v) of tiny gradients magnifies them.
        assert_close(ours[name], truth[name], rtol=2e-5, atol=4e-6)


@pytest.mark.parametrize(
    "world_size, options",
    [
        (1, {}),
        (2, {"backward_prefetch": None}),
        (3, {"backward_prefetch": "post"}),
        (4, {"backward_prefetch": "pre", "forward_prefetch": True}),
        (4, {"reshard_after_forward": False}),
        (2, {"max_norm": 0.5, "num_micro": 3}),
        (6, {}),
    ],
)
def test_matches_one_rank_on_all_rows(world_size, options):
    truth = one_rank(max_norm=options.get("max_norm"))
    for ours in run(world_size, lambda comm: train(comm, **options)).results:
        assert_same(ours, truth)


def test_matches_one_rank_with_tied_embeddings():
    truth = one_rank(model=fresh(is_tied=True))
    done = run(2, lambda comm: train(comm, model=fresh(is_tied=True)))
    assert_same(done.results[0], truth)


def test_hybrid_sharding_matches_one_rank():
    def program(comm):
        mesh = comm.mesh(replicas=2, shards=2)
        model = fresh()
        fsdp = FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)
        optimizer = adamw(fsdp.parameters())
        for batch in batches():
            optimizer.zero_grad()
            loss_of(fsdp, rows_of(comm, batch)).backward()
            optimizer.step()
        return fsdp.full_state_dict(), comm.traffic.total(group="replicas").payload_bytes

    truth = one_rank()
    for ours, _ in run(4, program).results:
        assert_same(ours, truth)


def theirs(comm, mesh_shape, precision=None, max_norm=None):
    """torch's fully_shard on the processes of `comm`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    names = ("replicate", "shard")[-len(mesh_shape) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        model = fresh()
        policy = precision or {}
        for block in model.layers:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
        optimizer = adamw(model.parameters())
        for batch in batches():
            optimizer.zero_grad()
            loss_of(model, rows_of(comm, batch)).backward()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_matches_torch_fully_shard():
    """Bit for bit at two ranks: a sum of two has one order."""

    def program(comm):
        return theirs(comm, (2,)), train(comm)

    for truth, ours in run(2, program, backend="processes", is_measured=False).results:
        assert ours.keys() == truth.keys()
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_matches_torch_fully_shard_in_mixed_precision():
    """bfloat16 parameters, float32 reduction: the same casts at the same places."""
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}

    def program(comm):
        return theirs(comm, (2,), precision), train(comm, precision=MixedPrecision(**precision))

    for truth, ours in run(2, program, backend="processes", is_measured=False).results:
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_matches_torch_hybrid_mesh():
    def program(comm):
        mesh = comm.mesh(replicas=2, shards=2)
        model = fresh()
        fsdp = FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)
        optimizer = adamw(fsdp.parameters())
        for batch in batches():
            optimizer.zero_grad()
            loss_of(fsdp, rows_of(comm, batch)).backward()
            optimizer.step()
        return theirs(comm, (2, 2)), fsdp.full_state_dict()

    for truth, ours in run(4, program, backend="processes", is_measured=False).results:
        assert_same(ours, truth)


def test_simulated_ranks_equal_real_processes():
    simulated, real = run(2, train), run(2, train, backend="processes")
    for ours, theirs_ in zip(simulated.results, real.results, strict=True):
        assert all(torch.equal(ours[name], theirs_[name]) for name in theirs_)
    assert simulated.trace.total().wire_bytes == real.trace.total().wire_bytes


def stack(num_layers=6, width=32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))


def one_step(comm, options, width=32, batch=8, num_layers=6):
    model = stack(num_layers, width)
    fsdp = FSDP(model, comm, model, **options)
    x = torch.ones(batch, width)
    fsdp(x).sum().backward()
    comm.traffic.reset()
    comm.memory.reset_peak()
    start = comm.now_seconds
    fsdp(x).sum().backward()
    use = comm.memory.use
    return use.peak["communication_buffers"], comm.traffic.total(), comm.now_seconds - start


def test_traffic_is_that_of_zero_3():
    num_parameters, num_matrices = 6 * 32 * 32, 6
    who_used_what = 3 * num_matrices  # a number for each parameter and other rank
    for _, traffic, _ in run(4, one_step, {}).results:
        assert traffic.wire_bytes == 4 * (elements_sent(num_parameters, 4, 3) + who_used_what)
    for _, traffic, _ in run(4, one_step, {"reshard_after_forward": False}).results:
        assert traffic.wire_bytes == 4 * (elements_sent(num_parameters, 4, 2) + who_used_what)


@pytest.mark.parametrize("prefetch", [None, "post", "pre"])
def test_the_root_is_gathered_and_reduced_once(prefetch):
    def program(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers, backward_prefetch=prefetch)
        comm.traffic.reset()
        loss_of(fsdp, rows_of(comm, batches()[0])).backward()
        totals = (comm.traffic.total(operation=op) for op in ("all_gather", "reduce_scatter"))
        return [total.num_calls for total in totals]

    assert run(2, program).results == [[2 * CONFIG.num_layers + 1, CONFIG.num_layers + 1]] * 2


@pytest.mark.slow
def test_prefetch_buys_time_with_memory():
    """On the clock: "pre" hides all gathers but the first, "post" those behind a reduction."""
    seconds, units = {}, {}
    for prefetch in (None, "post", "pre"):
        options = {"backward_prefetch": prefetch}
        done = run(4, lambda c, o=options: one_step(c, o, 256, 4096), hardware=CLASSROOM)
        peak, _, seconds[prefetch] = done.results[0]
        units[prefetch] = peak / (256 * 256 * 4)
    assert seconds["pre"] < seconds["post"] <= seconds[None]
    # Gathered vectors, and the parts of gradients on their way.
    assert units["pre"] == pytest.approx(units[None] + 1, abs=0.3)
    assert units["post"] == pytest.approx(units[None], abs=0.3)
    ahead = run(4, lambda c: one_step(c, {"forward_prefetch": True}, 256, 4096), hardware=CLASSROOM)
    assert ahead.results[0][2] < seconds["pre"]


def test_nothing_is_gathered_between_steps():
    def program(comm):
        model = stack()
        fsdp = FSDP(model, comm, model)
        optimizer = adamw(fsdp.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            fsdp(torch.ones(2, 32)).sum().backward()
            held = comm.memory.use.current
            optimizer.step()
        with torch.no_grad():
            fsdp(torch.ones(2, 32))
        return held, comm.memory.use.current["communication_buffers"]

    sizes = {"parameter_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8}
    expected = model_states_bytes(6 * 32 * 32, 4, 3, **sizes)
    for held, gathered in run(4, program).results:
        assert gathered == held["communication_buffers"] == 0
        assert held["activations"] < 32 * 32 * 4  # no weight is left over from forward
        assert held["parameters"] == expected.parameters
        assert held["gradients"] == expected.gradients
        assert held["optimizer_states"] == expected.optimizer_states + 6 * 4  # counts of steps


@pytest.mark.slow
def test_memory_of_8_billion_parameters_on_1024_ranks():
    """Shapes alone, from the meta device: 16 bytes a parameter, divided by the ranks."""
    config = LlamaConfig(
        vocab_size=128256, dim=8192, hidden_dim=28672, num_layers=6, num_heads=64, num_kv_heads=8
    )
    with torch.device("meta"):
        model = Llama(config)
    # Rank 0 has the most rows: 126 of the vocabulary's 128256, where the mean is 125.25.
    num_parameters = 1024 * sum(-(-len(p) // 1024) * p[0].numel() for p in model.parameters())

    def program(comm):
        fsdp = FSDP(model, comm, model.layers)
        optimizer = adamw(fsdp.parameters())
        for _ in range(2):
            loss_of(fsdp, torch.zeros(1, 9, dtype=torch.long)).backward()
            held = comm.memory.use.current
            optimizer.step()
        return sum(held[c] for c in ("parameters", "gradients", "optimizer_states"))

    expected = model_states_bytes(num_parameters, 1024, 3).total
    assert run_one_rank(1024, program).results[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("before, after", [(4, 2), (2, 3), (3, 4), (1, 4)])
def test_checkpoint_resumes_on_another_number_of_ranks(before, after, tmp_path):
    def steps(fsdp, optimizer, comm, chosen):
        for batch in chosen:
            optimizer.zero_grad()
            loss_of(fsdp, rows_of(comm, batch)).backward()
            optimizer.step()

    def first(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers)
        optimizer = adamw(fsdp.parameters())
        steps(fsdp, optimizer, comm, batches()[:2])
        save_sharded(tmp_path / "step", fsdp, optimizer, step=2)

    def second(comm):
        with torch.device("meta"):
            model = fresh()
        fsdp = FSDP(model, comm, model.layers)
        optimizer = adamw(fsdp.parameters())
        assert load_sharded(tmp_path / "step", fsdp, optimizer) == 2
        steps(fsdp, optimizer, comm, batches()[2:])
        return fsdp.full_state_dict()

    run(before, first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step"]
    assert_same(run(after, second).results[0], one_rank())


def test_checkpoint_of_hybrid_sharding_is_written_once_and_read_by_all(tmp_path):
    def sharded(comm, model):
        mesh = comm.mesh(replicas=2, shards=2)
        return FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)

    def program(comm):
        save_sharded(tmp_path / "step", sharded(comm, fresh()), step=1)
        with torch.device("meta"):
            model = fresh()
        fsdp = sharded(comm, model)
        load_sharded(tmp_path / "step", fsdp)
        return fsdp.full_state_dict()

    for ours in run(4, program).results:
        assert all(torch.equal(ours[n], p) for n, p in fresh().named_parameters())
    assert len(list((tmp_path / "step").glob("rank-*"))) == 2


def test_rejects_checkpoints_that_do_not_fit(tmp_path):
    def save(comm):
        model = fresh()
        save_sharded(tmp_path / "a", FSDP(model, comm, model.layers))

    def load(comm, folder, optimizer=False, **changes):
        model = fresh(**changes)
        fsdp = FSDP(model, comm, model.layers)
        load_sharded(folder, fsdp, adamw(fsdp.parameters()) if optimizer else None)

    run(2, save)
    with pytest.raises(ValueError, match="differs in .*layers.0"):
        run(2, lambda comm: load(comm, tmp_path / "a", hidden_dim=24))
    with pytest.raises(ValueError, match="expected optimizer states"):
        run(2, lambda comm: load(comm, tmp_path / "a", optimizer=True))
    with pytest.raises(FileNotFoundError, match="expected a checkpoint by save_sharded"):
        run(2, lambda comm: load(comm, tmp_path / "b"))
    (tmp_path / "a" / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="missing .*rank-00001"):
        run(3, lambda comm: load(comm, tmp_path / "a"))


def test_parameters_out_of_turn_give_an_error_not_old_values():
    def regularised(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers)
        (loss_of(fsdp, batches()[0]) + model.layers[0].mlp.up_proj.weight.square().sum()).backward()

    def stepped(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers)
        loss = loss_of(fsdp, batches()[0])
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight.mul_(2)
        loss.backward()

    def late(comm):
        model = fresh()
        fsdp = FSDP(model, comm, model.layers)
        weight = model.layers[0].mlp.up_proj
        fsdp.module.register_forward_pre_hook(lambda *_: weight.weight @ torch.ones(CONFIG.dim))
        loss_of(fsdp, batches()[0])

    with pytest.raises(RuntimeError, match="meta"):
        run(2, late)
    with pytest.raises(RuntimeError, match="layers.0.mlp.up_proj.weight: this rank's shard was"):
        run(2, regularised)
    with pytest.raises(RuntimeError, match="layers.1: its parameters have changed since"):
        run(2, stepped)


@pytest.mark.parametrize(
    "message, build",
    [
        ("modules inside of the model", lambda m, c: FSDP(m, c, [m])),
        ("modules inside of the model", lambda m, c: FSDP(m, c, [nn.Linear(2, 2)])),
        ("'layers.0.mlp' is there twice, or inside",
         lambda m, c: FSDP(m, c, [m.layers[0], m.layers[0].mlp])),
        ("backward_prefetch: expected", lambda m, c: FSDP(m, c, backward_prefetch="early")),
    ],
)  # fmt: skip
def test_rejects(message, build):
    with pytest.raises(ValueError, match=message):
        run(1, lambda comm: build(fresh(), comm))


def test_rejects_what_cannot_be_sharded():
    def build(*layers, units=()):
        def program(comm):
            model = nn.Sequential(*layers)
            return FSDP(model, comm, [model[i] for i in units])

        return lambda: run(1, program)

    with pytest.raises(ValueError, match="'1' has no parameters"):
        build(nn.Linear(2, 2), nn.ReLU(), units=[1])()
    with pytest.raises(ValueError, match="model: expected parameters, got none"):
        build(nn.ReLU())()
    with pytest.raises(TypeError, match="0: expected modules that read .* got LSTM"):
        build(nn.LSTM(2, 2))()
    scalar = nn.Linear(2, 2)
    scalar.gain = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="expected at least one dimension to cut along"):
        build(scalar)()
    with pytest.raises(ValueError, match="0.weight is sharded already; wrap a model once"):
        run(1, lambda c: FSDP(FSDP(nn.Sequential(nn.Linear(2, 2)), c).module, c))
