"""Oracles: one rank with the whole adapters; peft, trained and loaded.

Reports of the kind: modelscope/mcore-bridge 173 (the copies of a replicated factor drift with
sequence parallelism, and rank 0's is exported), NVIDIA-NeMo/Speech 10280 (widths of adapters with
sequence parallelism), huggingface/peft 2394 and 3079 (adapters are left out of the plan),
sgl-project/sglang 16215 (the head's B as wide as the whole vocabulary), NVIDIA-NeMo/Megatron-Bridge
2193 (adapters of one tensor size merged at another).
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from reference.lora import (
    LoRAConfig,
    add_adapter,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
    use_rows,
)
from reference.parallel.ranks import run
from reference.parallel.tensor import clip_grad_norm, parallelize, vocab_parallel_cross_entropy
from reference.parallel.tensor.cut import parameters_with_cuts
from reference.parallel.zero import Zero
from reference.quantization.qlora import make_qlora
from reference.transformer import save_pretrained
from tests.reference.parallel.tensor.workload import (
    CLOSE,
    INPUTS,
    TARGETS,
    fresh,
    learned,
    mean_loss,
    train,
    train_one_rank,
    train_ranks,
)
from tests.tolerances import TOLERANCE

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONE = LoRAConfig(rank=3, alpha=6, targets=ALL)
HEAD = LoRAConfig(rank=2, alpha=3, targets=("lm_head", "k_proj", "down_proj"),
                  is_rank_stabilised=True)  # fmt: skip


def adapted(*configs, **changes):
    model = fresh(**changes)
    for name, config in zip(("one", "two"), configs, strict=False):
        add_adapter(model, config, name)
    return learned(model)


def assert_same_training(model, world_size, **options):
    losses, state = train_one_rank(model)
    for ours, found in train_ranks(model, world_size, **options):
        assert_close(ours, losses, **CLOSE)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert_close(found[name], tensor, **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size, num_kv_heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("is_tied", [False, True])
def test_matches_one_rank(world_size, num_kv_heads, sequence_parallel, is_tied):
    """Losses and all parameters after three steps of AdamW; the frozen base as it was."""
    model = adapted(ONE, num_kv_heads=num_kv_heads, is_tied=is_tied)
    assert_same_training(model, world_size, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("active", [("one",), ("two",), ("one", "two"), ()])
def test_matches_one_rank_with_several_adapters(active, sequence_parallel):
    """On the head as well, rank-stabilised; those that are not active stay as they are."""
    model = adapted(ONE, HEAD)
    set_adapter(model, *active)
    if not active:
        model.norm.weight.requires_grad_(True)
    assert_same_training(model, 4, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_one_rank_with_an_adapter_for_each_row(sequence_parallel):
    model = adapted(ONE, HEAD)
    set_adapter(model, "one", "two")

    def gradients(part, loss_of):
        with use_rows(part, ["two", "one"]):
            loss_of(part(INPUTS)).backward()

    def program(comm):
        part = parallelize(model, comm, sequence_parallel=sequence_parallel)
        gradients(part, lambda z: vocab_parallel_cross_entropy(z, TARGETS, comm).mean())
        return part.whole(lambda p: p.grad)

    one = copy.deepcopy(model)
    gradients(one, lambda z: F.cross_entropy(z.flatten(0, 1), TARGETS.flatten()))
    truth = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    for found in run(4, program, is_measured=False).results:
        assert found.keys() == truth.keys()
        for name in truth:
            assert_close(found[name], truth[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_matches_one_rank_with_the_same_dropout(monkeypatch, world_size, sequence_parallel):
    """One rank that draws the masks that the ranks share; none of it in eval."""
    config = LoRAConfig(rank=3, alpha=6, targets=ALL, dropout=0.4)
    model = adapted(config)
    done = train_ranks(model, world_size, sequence_parallel=sequence_parallel)
    stream = torch.Generator().manual_seed(0)  # the seed of rank 0 in `run`

    def drop(x, rate, training):
        return x * (torch.rand(x.shape, generator=stream) >= rate) / (1 - rate)

    with monkeypatch.context() as patch:
        patch.setattr("reference.lora.layer.F.dropout", drop)
        losses, state = train_one_rank(model)
    for ours, found in done:
        assert_close(ours, losses, **CLOSE)
        for name in state:
            assert_close(found[name], state[name], **CLOSE, msg=name)

    def evaluated(comm):
        return parallelize(copy.deepcopy(model).eval(), comm)(INPUTS).detach()

    logits = torch.cat(run(world_size, evaluated).results, -1)
    assert_close(logits, copy.deepcopy(model).eval()(INPUTS).detach(), **CLOSE)


@pytest.mark.parametrize("when", ["before", "after"])
def test_matches_one_rank_merged(when):
    """Merged and then divided, or divided and then merged; undone bit for bit, and taken off."""
    model = adapted(ONE, num_kv_heads=1)
    whole = copy.deepcopy(model)
    merge(whole)

    def program(comm):
        if when == "before":
            part = parallelize(whole, comm)
        else:
            part = parallelize(model, comm)
            merge(part)
        logits, weights = part(INPUTS).detach(), part.full_state_dict()
        unmerge(part)
        undone = part.full_state_dict()
        merge(part)
        unload(part)
        return logits, weights, undone, part(INPUTS).detach()

    done = run(4, program, is_measured=False).results
    truth = whole(INPUTS).detach()
    for place in (0, 3):
        assert_close(torch.cat([r[place] for r in done], -1), truth, **CLOSE)
    for _, weights, undone, _ in done:
        for name, tensor in whole.state_dict().items():
            assert_close(weights[name], tensor, **CLOSE)
        assert all(torch.equal(undone[name], t) for name, t in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_peft(tmp_path, sequence_parallel):
    """peft trains the same adapter for three steps; then it loads ours, from four ranks."""
    from transformers import LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    base, model = fresh(), adapted(ONE)
    save_pretrained(base, tmp_path / "base")
    save_adapter(model, tmp_path / "before", "one")

    def theirs(folder, **options):
        whole = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", attn_implementation="eager", dtype=torch.float64
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(whole, tmp_path / folder, **options)

    trained = theirs("before", is_trainable=True).train()
    losses = train(trained, lambda out: F.cross_entropy(out.logits.flatten(0, 1),
                                                        TARGETS.flatten()))  # fmt: skip
    ours, state = train_ranks(model, 4, sequence_parallel=sequence_parallel)[0]
    # transformers computes RoPE's angles in float32.
    assert_close(ours, losses, rtol=1e-5, atol=1e-5)
    model.load_state_dict(state)
    save_adapter(model, tmp_path / "after", "one")
    with torch.no_grad():
        loaded = theirs("after").eval()(INPUTS).logits
        assert_close(loaded, trained.eval()(INPUTS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved, loaded", [(4, 2), (2, 4), (4, 1)])
def test_invariant_a_state_does_not_know_how_it_was_divided(saved, loaded):
    """Two steps at one tensor size and two at another: four at one rank. SGD has no other state."""
    model = adapted(ONE, HEAD, num_kv_heads=2)

    def steps(comm, whole, count):
        part = parallelize(whole, comm)
        optimizer = torch.optim.SGD(trainable_parameters(part), lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            vocab_parallel_cross_entropy(part(INPUTS), TARGETS, comm).mean().backward()
            optimizer.step()
        return part.full_state_dict()

    truth = run(1, steps, model, 4).results[0]
    half = copy.deepcopy(model)
    half.load_state_dict(run(saved, steps, model, 2).results[0])
    for found in run(loaded, steps, half, 2).results:
        for name in truth:
            assert_close(found[name], truth[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_invariant_copies_stay_copies_though_each_rank_drew_its_own(sequence_parallel):
    """NVIDIA-NeMo/Megatron-Bridge 5396, InfiniTensor/InfiniTrain 150: A from a rank's own seed."""
    config = LoRAConfig(rank=3, alpha=6, targets=("q_proj", "v_proj", "down_proj"), dropout=0.3)
    base = fresh(num_kv_heads=1)

    def program(comm):
        model = add_adapter(copy.deepcopy(base), config)
        own = model.layers[0].self_attn.q_proj.adapter("default").a.detach().clone()
        part = parallelize(model, comm, sequence_parallel=sequence_parallel)
        train(part, lambda z: vocab_parallel_cross_entropy(z, TARGETS, comm).mean())
        alike = [p.detach() for _, p, cut in parameters_with_cuts(part) if cut.dim is None]
        return own, alike, part.layers[1].self_attn.v_proj.adapter("default").b.detach()

    (first, alike, copied), *others = run(4, program, is_measured=False).results
    for own, theirs, shared in others:
        assert not torch.equal(own, first)
        assert all(torch.equal(a, b) for a, b in zip(alike, theirs, strict=True))
        assert torch.equal(shared, copied) and shared.abs().max() > 0


@pytest.mark.slow
def test_matches_processes():
    """The same program on gloo, with dropout: the same bits."""
    config = LoRAConfig(rank=3, alpha=6, targets=ALL, dropout=0.3)
    model = adapted(config, num_layers=1)

    def program(comm):
        part = parallelize(model, comm, sequence_parallel=True)
        train(part, lambda z: vocab_parallel_cross_entropy(z, TARGETS, comm).mean(), steps=1)
        norm = clip_grad_norm(part, 0.1, comm)
        return norm, part.state_dict()

    simulated, real = run(2, program), run(2, program, backend="processes")
    for (norm, state), (their_norm, theirs) in zip(simulated.results, real.results, strict=True):
        assert torch.equal(norm, their_norm)
        assert all(torch.equal(state[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_matches_one_rank_with_data_parallelism(stage):
    """Two rows of the batch, each on two tensor ranks, under ZeRO."""
    model = adapted(ONE).float()

    def program(comm):
        mesh = comm.mesh(dp=2, tp=2)
        part = parallelize(model, mesh.tp, sequence_parallel=True)
        zero = Zero(part, mesh.dp, stage, lambda p: torch.optim.SGD(p, lr=0.5), bucket_bytes=300)
        tokens, targets = (t.chunk(2)[mesh.dp.rank] for t in (INPUTS, TARGETS))
        vocab_parallel_cross_entropy(part(tokens), targets, mesh.tp).mean().backward()
        zero.step()
        return part.full_state_dict()

    one = copy.deepcopy(model)
    mean_loss(one(INPUTS)).backward()
    torch.optim.SGD(trainable_parameters(one), lr=0.5).step()
    for found in run(4, program, is_measured=False).results:
        for name, tensor in one.state_dict().items():
            assert_close(found[name], tensor, **TOLERANCE[torch.float32], msg=name)


def test_invariant_frozen_weights_send_nothing_back():
    """Backward all-reduces what the stream needs and, for each adapter, its whole factor."""
    frozen = add_adapter(fresh(num_layers=1), LoRAConfig(rank=3, alpha=6, targets=("down_proj",)))

    def program(comm):
        part = parallelize(frozen, comm)
        loss = vocab_parallel_cross_entropy(part(INPUTS), TARGETS, comm).mean()
        comm.traffic.reset()
        loss.backward()
        learns = {name for name, p in part.named_parameters() if p.requires_grad}
        given = {name for name, p in part.named_parameters() if p.grad is not None}
        row = comm.traffic.total(operation="all_reduce")
        return learns, given, row.num_calls, row.payload_bytes

    learns, given, calls, payload = run(2, program).results[0]
    names = {f"layers.0.mlp.down_proj.adapters.default.{m}" for m in "ab"}
    assert learns == given == names
    # The head's input, and B (16, 3). Nothing below the last matrix learns.
    assert (calls, payload) == (2, (2 * 8 * 16 + 16 * 3) * 8)


def test_invariant_adapters_keep_active_sets_and_configurations():
    model = adapted(ONE, HEAD)
    set_adapter(model, "two")

    def program(comm):
        part = parallelize(model, comm)
        found = [(m.active, {n: a.config for n, a in m.adapters.items()})
                 for m in lora_layers(part)]  # fmt: skip
        set_adapter(part, "one", "two")
        return found, {n for n, p in part.named_parameters() if p.requires_grad}

    found, learns = run(2, program).results[0]
    truth = [(m.active, {n: a.config for n, a in m.adapters.items()}) for m in lora_layers(model)]
    assert found == truth
    set_adapter(model, "one", "two")
    assert learns == {n for n, p in model.named_parameters() if p.requires_grad}


def test_rejects_adapters_on_parts(tmp_path):
    """A of its own on each rank, and nobody to sum its gradient; files with parts in them."""
    save_adapter(adapted(ONE), tmp_path / "saved", "one")

    def put_on(part):
        add_adapter(part, ONE, "late")

    def load(part):
        load_adapter(part, tmp_path / "saved", "late")

    def save(part):
        save_adapter(part, tmp_path / "parts", "one")

    def quantize(part):
        make_qlora(part, ONE)

    cases = [(fresh(), put_on), (adapted(ONE), put_on), (fresh(), load), (adapted(ONE), save),
             (fresh(), quantize)]  # fmt: skip
    for model, act in cases:
        with pytest.raises(ValueError, match="expected a whole layer, got a rank's part of one"):
            run(2, lambda comm, m=model, a=act: a(parallelize(m, comm)))
    assert not (tmp_path / "parts").exists()


def test_rejects_quantized_layers_by_name():
    """vLLM refused them as well (13122, 13297): scales belong to blocks of the whole matrix."""
    model = fresh(torch.float32, dim=64, hidden_dim=64, head_dim=16)
    make_qlora(model, ONE)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: .* got QLoRALinear, which"):
        run(2, lambda comm: parallelize(model, comm))
