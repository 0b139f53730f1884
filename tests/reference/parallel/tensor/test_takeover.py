"""What a part takes over. Oracles: the whole model's own entries; one rank; torch's DTensor.

Reports of the kind: pytorch/pytorch 171523 and pytorch/torchtitan 3885, 4267 (frozen parameters
learn after parallelize_module), foundation-model-stack 331 and sglang 16215 (tied embeddings),
vllm-project/vllm 52147 (one tied weight becomes two).
"""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.activations import FusedSwiGLU
from reference.attention import Attention
from reference.kv_cache import DynamicCache, generate
from reference.lora import LoRAConfig, add_adapter, add_bottlenecks
from reference.parallel.ranks import run
from reference.parallel.tensor import (
    ColumnParallelLinear,
    GPTLayer,
    ParallelGPTLayer,
    RandomStreams,
    RowParallelLinear,
    parallelize,
    vocab_parallel_cross_entropy,
)
from reference.transformer.fused import fused_causal_attention
from reference.transformer.optimizer import decay_groups
from tests.reference.parallel.tensor.workload import (
    CLOSE,
    INPUTS,
    TARGETS,
    fresh,
    mean_loss,
    train_one_rank,
    train_ranks,
)
from tests.tolerances import TOLERANCE


def described(model):
    """Of each parameter: dtype, whether it learns, dimensions, and which other names it has."""
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {
        name: (p.dtype, p.requires_grad, p.ndim, names[id(p)])
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def freeze(model, *parts):
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in parts))
    return model


def mixed():
    """Frozen, tied, in several dtypes, with buffers, partly in eval."""
    model = freeze(fresh(torch.bfloat16, num_kv_heads=1), "embed_tokens", "o_proj", "norm.weight")
    model.lm_head.weight = model.embed_tokens.weight
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    model.layers[1].self_attn.v_proj.weight = model.layers[0].self_attn.v_proj.weight
    model.layers[1].post_attention_layernorm.weight = model.norm.weight
    model.layers[0].mlp.float()
    add_adapter(model, LoRAConfig(rank=2, alpha=2))
    model.layers[0].mlp.gate_proj.weight.requires_grad_(True)
    block = model.layers[0]
    for owner in (model, block, model.layers[1].self_attn, model.norm, block.mlp.down_proj,
                  block.self_attn.q_proj.base):  # fmt: skip
        owner.register_buffer("seen", torch.arange(3.0))
        owner.register_buffer("passing", torch.arange(2), persistent=False)
    model.layers[0].mlp.eval()
    return model


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_invariant_a_part_is_described_as_the_whole(sequence_parallel):
    model = mixed()
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def program(comm):
        part = parallelize(model, comm, sequence_parallel=sequence_parallel)
        groups = [len(group["params"]) for group in decay_groups(part, 0.1)]
        modes = {name: m.training for name, m in part.named_modules()}
        return described(part), groups, modes, dict(part.named_buffers()), part.full_state_dict()

    modes = {name: m.training for name, m in model.named_modules()}
    for parameters, groups, training, buffers, state in run(4, program).results:
        assert parameters == described(model)
        assert groups == [len(group["params"]) for group in decay_groups(model, 0.1)]
        assert training == modes
        assert buffers.keys() == dict(model.named_buffers()).keys()
        assert list(state) == list(before)
        for name, tensor in before.items():
            assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("frozen", [("embed_tokens", "layers.0"), ("norm",), ("lm_head", "v_proj")])
def test_matches_one_rank_partly_frozen(frozen, sequence_parallel):
    model = freeze(fresh(num_kv_heads=1), *frozen)
    losses, state = train_one_rank(model)
    for ours, found in train_ranks(model, 4, sequence_parallel=sequence_parallel):
        assert_close(ours, losses, **CLOSE)
        for name in state:
            assert_close(found[name], state[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_one_rank_tied_by_hand(sequence_parallel):
    """Head and embedding, and matrices of two layers: one weight, one gradient, one step."""
    model = fresh()
    model.lm_head.weight = model.embed_tokens.weight
    for name in ("mlp.down_proj", "self_attn.k_proj", "input_layernorm"):
        model.layers[1].get_submodule(name).weight = model.layers[0].get_submodule(name).weight
    losses, state = train_one_rank(model)
    for ours, found in train_ranks(model, 4, sequence_parallel=sequence_parallel):
        assert_close(ours, losses, **CLOSE)
        for name in state:
            assert_close(found[name], state[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_matches_one_rank_with_biases(num_kv_heads, sequence_parallel):
    """Also on the matrices whose outputs are summed: once."""
    model = fresh(num_kv_heads=num_kv_heads)
    for layer, block in enumerate(model.layers):
        block.self_attn = Attention(
            16, num_heads=4, num_kv_heads=num_kv_heads, bias=True, layer=layer
        ).double()
    losses, state = train_one_rank(model)
    for ours, found in train_ranks(model, 4, sequence_parallel=sequence_parallel):
        assert_close(ours, losses, **CLOSE)
        for name in state:
            assert_close(found[name], state[name], **CLOSE, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matches_one_rank_under_autocast(sequence_parallel):
    """Products in bfloat16, sums of ranks in it too; parameters and gradients in float32.

    torch's kernel casts its inputs; ours refuses keys and values of two dtypes, on one rank too.
    """
    model = fresh(torch.float32)
    for p in model.parameters():
        p.data *= 0.3

    def program(comm):
        part = parallelize(model, comm, sequence_parallel=sequence_parallel)
        with torch.autocast("cpu", torch.bfloat16):
            logits = part(INPUTS, attend=fused_causal_attention)
        assert logits.dtype == torch.bfloat16
        vocab_parallel_cross_entropy(logits.float(), TARGETS, comm).mean().backward()
        return logits.detach(), part.whole(lambda p: p.grad)

    one = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        truth = one(INPUTS, attend=fused_causal_attention)
    mean_loss(truth.float()).backward()
    done = run(2, program, is_measured=False).results
    assert_close(torch.cat([r[0] for r in done], -1), truth.detach(), **TOLERANCE[torch.bfloat16])
    for _, grads in done:
        for name, p in one.named_parameters():
            assert grads[name].dtype == torch.float32
            error = (grads[name] - p.grad).norm() / p.grad.norm()
            assert error < TOLERANCE[torch.bfloat16]["rtol"], name


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_generates_what_one_rank_generates(num_kv_heads):
    model = fresh(num_kv_heads=num_kv_heads).eval()
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]

    def program(comm):
        part = parallelize(model, comm, gather_logits=True)
        logits = part(INPUTS)
        mean_loss(logits).backward()
        return generate(part, prompts, 5, cache=DynamicCache()), part.whole(lambda p: p.grad)

    truth = generate(model, prompts, 5)
    mean_loss(model(INPUTS)).backward()
    for tokens, grads in run(4, program, is_measured=False).results:
        assert torch.equal(tokens, truth)
        for name, p in model.named_parameters():
            assert_close(grads[name], p.grad, **CLOSE)


@pytest.mark.parametrize("gather_logits", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_last_logits_are_the_texts_last(sequence_parallel, gather_logits):
    """Each rank has the last of its own positions: not those."""
    model = fresh()

    def program(comm):
        part = parallelize(model, comm, sequence_parallel=sequence_parallel,
                           gather_logits=gather_logits)  # fmt: skip
        return part(INPUTS, num_logits=3).detach()

    done = run(2, program).results
    found = done[0] if gather_logits else torch.cat(done, -1)
    assert_close(found, model(INPUTS, num_logits=3).detach(), **CLOSE)
    assert all(torch.equal(done[0], r) for r in done) or not gather_logits


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "cache: expected whole logits beside it.*gather_logits=True"),
        ({"sequence_parallel": True, "gather_logits": True}, "cache: expected none with sequence"),
    ],
)
def test_rejects_a_cache_from_which_nothing_can_be_chosen(options, message):
    def program(comm):
        generate(parallelize(fresh(), comm, **options), [torch.tensor([1, 2])], 2)

    with pytest.raises(ValueError, match=message):
        run(2, program)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_parametrization(model):
    nn.utils.parametrizations.orthogonal(model.layers[0].mlp.up_proj)


def with_forward_hook(model):
    model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_gradient_hook(model):
    model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)


def with_padding(model):
    model.embed_tokens.padding_idx = 3


def with_a_head_more(model):
    model.score = nn.Linear(16, 1)


def tied_across_cuts(model):
    model.layers[0].self_attn.o_proj.weight = model.layers[0].self_attn.q_proj.weight


def with_a_layer_of_another_kind(model):
    model.layers[0].mlp.gate_proj = Doubled(16, 24, bias=False)


def with_fused_mlp(model):
    model.layers[0].mlp = FusedSwiGLU.from_separate(model.layers[0].mlp)


@pytest.mark.parametrize(
    "change, message",
    [
        (with_a_layer_of_another_kind, "layers.0.mlp.gate_proj: .* got Doubled"),
        (with_parametrization, "layers.0.mlp.up_proj: .* got ParametrizedLinear"),
        (with_fused_mlp, "layers.0.mlp: .* got FusedSwiGLU"),
        (lambda model: add_bottlenecks(model, 2), "layers.0.self_attn: .* got Followed"),
        (with_forward_hook, "layers.1.mlp: expected no hooks"),
        (with_gradient_hook, "norm.weight: expected no hooks"),
        (with_padding, "embed_tokens: expected padding_idx=None, got 3"),
        (with_a_head_more, "score.bias: expected a parameter or buffer of a Llama"),
        (tied_across_cuts, "o_proj.weight: .*it is layers.0.self_attn.q_proj.weight as well"),
    ],
)
def test_rejects_what_would_be_lost(change, message):
    model = fresh()
    change(model)
    before = described(model)
    with pytest.raises(ValueError, match=message):
        run(2, lambda comm: parallelize(model, comm))
    assert described(model) == before


def test_rejects_a_model_that_is_divided_already():
    with pytest.raises(ValueError, match="model: .* got ParallelLlama"):
        run(2, lambda comm: parallelize(parallelize(fresh(), comm), comm))


def test_matches_dtensor_in_names_and_what_is_frozen():
    """torch's own styles on a pair of layers: the same names; what was frozen has no gradient."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}).double()
    pair["up"].weight.requires_grad_(False)
    pair["down"].bias.requires_grad_(False)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()

    def gradients(modules):
        modules["down"](torch.relu(modules["up"](x))).square().sum().backward()
        return {n: p.grad for n, p in modules.named_parameters() if p.grad is not None}

    def program(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        ours = nn.ModuleDict(
            {
                "up": ColumnParallelLinear(pair["up"], comm),
                "down": RowParallelLinear(pair["down"], comm),
            }
        )
        theirs = copy.deepcopy(pair)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(theirs, init_device_mesh("cpu", (comm.size,)), plan)
        for name, p in theirs.named_parameters():
            p.requires_grad_(pair.get_parameter(name).requires_grad)  # pytorch 171523
        names = [dict(m.named_parameters()).keys() for m in (ours, theirs)]
        assert names[0] == names[1]
        return gradients(ours), {n: g.to_local() for n, g in gradients(theirs).items()}

    for ours, theirs in run(2, program, backend="processes", is_measured=False).results:
        assert ours.keys() == theirs.keys() == {"up.bias", "down.weight"}
        for name in ours:
            assert_close(ours[name], theirs[name], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_gpt_layer_keeps_names_and_what_is_frozen_and_drops_only_in_training(sequence_parallel):
    torch.manual_seed(0)
    layer = GPTLayer(16, 4).double()
    layer.up.weight.requires_grad_(False)
    layer.out.bias.requires_grad_(False)
    layer.norms[0].weight.requires_grad_(False)
    layer.eval()
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).double()

    def program(comm, rate):
        streams = RandomStreams(comm, 0)
        part = ParallelGPTLayer(layer, comm, streams, rate=rate,
                                sequence_parallel=sequence_parallel)  # fmt: skip
        mine = x.chunk(comm.size, 1)[comm.rank] if sequence_parallel else x
        y = part(mine)
        y.sum().backward()
        given = {n for n, p in part.named_parameters() if p.grad is not None}
        return y.detach(), described(part), given

    for (dropped, parameters, given), (plain, *_) in zip(
        run(2, program, 0.5).results, run(2, program, 0.0).results, strict=True
    ):
        assert torch.equal(dropped, plain)
        assert parameters == described(layer)
        assert given == {n for n, p in layer.named_parameters() if p.requires_grad}
