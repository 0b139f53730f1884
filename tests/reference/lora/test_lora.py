"""Oracles: peft on the same model, merged weights in float64, torch's FLOP counter."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from reference.lora import (
    LoRAConfig,
    LoRALinear,
    adam_bytes,
    adapter_flops,
    adapter_names,
    add_adapter,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge,
    optimizer_state_bytes,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
    use_rows,
)
from reference.transformer import Llama, LlamaConfig, save_pretrained
from tests.tolerances import TOLERANCE

CONFIG = LlamaConfig(
    vocab_size=40, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64
)
TOKENS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
QV = LoRAConfig(rank=3, alpha=6)


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    return peft


def fresh(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return Llama(dataclasses.replace(CONFIG, **changes)).to(dtype)


def learned(model, name=None, seed=5):
    """Give B values other than zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model):
            for own, adapter in layer.adapters.items():
                if name in (None, own):
                    adapter.b.normal_(generator=generator, std=0.1)
    return model


def theirs_of(model, tmp_path):
    """The same base in transformers."""
    from transformers import LlamaForCausalLM

    save_pretrained(model, tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")


def test_a_new_adapter_changes_nothing():
    model = fresh()
    before = model(TOKENS)
    add_adapter(model, QV)
    assert torch.equal(model(TOKENS), before)
    assert all(
        adapter.a.abs().max() > 0 for m in lora_layers(model) for adapter in m.adapters.values()
    )


@pytest.mark.parametrize("is_stabilised", [False, True])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_files_load_in_peft_bit_for_bit(peft, tmp_path, is_stabilised, targets):
    config = LoRAConfig(rank=4, alpha=6, targets=targets, is_rank_stabilised=is_stabilised)
    base = theirs_of(fresh(), tmp_path)
    model = learned(add_adapter(fresh(), config))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, model.eval()(TOKENS))
        merge(model)
        assert torch.equal(theirs.merge_and_unload()(TOKENS).logits, model(TOKENS))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
def test_peft_files_load_here_bit_for_bit(peft, tmp_path, targets):
    base = theirs_of(fresh(), tmp_path)
    torch.manual_seed(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, lora_alpha=5, target_modules=targets, init_lora_weights=False, lora_dropout=0.1
        )
        theirs = peft.get_peft_model(base, config).eval()
        theirs.save_pretrained(tmp_path / "adapter")
    model = fresh().eval()
    loaded = load_adapter(model, tmp_path / "adapter")
    assert (loaded.rank, loaded.alpha, loaded.dropout) == (4, 5, 0.1)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), theirs(TOKENS).logits)
    other = theirs_of(fresh(), tmp_path).eval()  # and on a model of transformers
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, theirs(TOKENS).logits)


def test_gradients_match_peft_bit_for_bit(peft, tmp_path):
    base = theirs_of(fresh(), tmp_path)
    model = learned(add_adapter(fresh(), QV))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), TOKENS.flatten()).backward()
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            peer = theirs.base_model.model.model.get_submodule(path)
            assert torch.equal(layer.adapters["default"].a.grad, peer.lora_A.default.weight.grad)
            assert torch.equal(layer.adapters["default"].b.grad, peer.lora_B.default.weight.grad)
            assert layer.base.weight.grad is None


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merged_weights_give_the_same_and_unmerge_is_exact(dtype):
    model = learned(add_adapter(fresh(dtype), LoRAConfig(rank=3, alpha=6, targets="all-linear")))
    before = copy.deepcopy(model.state_dict())
    apart = model(TOKENS)
    merge(model)
    assert_close(model(TOKENS), apart, **{k: 4 * v for k, v in TOLERANCE[dtype].items()})
    unmerge(model)
    assert torch.equal(model(TOKENS), apart)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_merged_weight_is_w_plus_scaled_product():
    layer = LoRALinear(torch.nn.Linear(5, 4, bias=False).double())
    layer.add("one", LoRAConfig(rank=2, alpha=3, is_rank_stabilised=True))
    torch.nn.init.normal_(layer.adapters["one"].b)
    a, b, w = layer.adapters["one"].a, layer.adapters["one"].b, layer.weight.clone()
    layer.merge()
    assert_close(layer.weight, w + 3 / math.sqrt(2) * b @ a, **TOLERANCE[torch.float64])


def test_merged_inference_costs_exactly_the_base_flops():
    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(TOKENS)
        return counter.get_total_flops()

    base = flops(fresh())
    model = learned(add_adapter(fresh(), LoRAConfig(rank=3, alpha=6, targets="all-linear")))
    assert flops(model) == base + adapter_flops(model, TOKENS.numel())
    merge(model)
    assert flops(model) == base and adapter_flops(model, TOKENS.numel()) == 0
    assert flops(unload(model)) == base
    assert not list(lora_layers(model))


def test_switching_and_adding_up_adapters():
    model = fresh()
    plain = model(TOKENS)
    for seed, name in enumerate("ab"):
        add_adapter(model, LoRAConfig(rank=2 + seed, alpha=4), name)
        learned(model, name, seed=seed)
    outputs = {}
    for names in ((), ("a",), ("b",), ("a", "b")):
        set_adapter(model, *names)
        outputs[names] = model(TOKENS)
        trained = {p for m in lora_layers(model) for n in names for p in m.adapters[n].parameters()}
        assert set(trainable_parameters(model)) == trained
    assert torch.equal(outputs[()], plain)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == 4
    layer = next(lora_layers(model))
    x = torch.randn(2, 16)
    deltas = [layer.adapters[name].delta() for name in "ab"]
    expected = layer.base(x) + F.linear(x, sum(deltas))
    assert_close(layer(x), expected, **TOLERANCE[torch.float32])


def test_each_row_may_have_its_own_adapter():
    model = fresh()
    for seed, name in enumerate("ab"):
        add_adapter(model, LoRAConfig(rank=2 + seed, alpha=4, targets="all-linear"), name)
        learned(model, name, seed=seed)
    alone = []
    for row, names in enumerate((("b",), (), ("a",))):
        set_adapter(model, *names)
        alone.append(model(TOKENS[row : row + 1]))
    with use_rows(model, ["b", None, "a"]):
        together = model(TOKENS)
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    set_adapter(model)
    assert torch.equal(model(TOKENS), fresh()(TOKENS))


def test_only_adapters_learn_and_optimizer_bytes_equal_the_formula():
    config = LoRAConfig(rank=3, alpha=6, targets="all-linear")
    model = add_adapter(fresh(), config)
    shapes = [tuple(layer.weight.shape) for layer in lora_layers(model)]
    assert len(shapes) == 14
    parameters = trainable_parameters(model)
    count = sum(p.numel() for p in parameters)
    assert count == lora_parameters(shapes, 3)
    optimizer = torch.optim.AdamW(parameters)
    model(TOKENS).sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == adam_bytes(count)


@pytest.mark.parametrize(
    "millions, rank, matrices", [(4.7, 1, 2), (37.7, 8, 2), (18.8, 4, 2), (301.9, 64, 2)]
)
def test_gpt_3_parameters_of_the_paper(millions, rank, matrices):
    """Table 4 and 15 print truncated numbers: 96 layers of width 12288."""
    count = lora_parameters([(12288, 12288)] * 96 * matrices, rank)
    assert millions == pytest.approx(count / 1e6, abs=0.1)


def test_checkpoint_of_the_paper():
    """Section 4.2: 350 GB become 35 MB at r = 4, "roughly 10,000 times"."""
    count = lora_parameters([(12288, 12288)] * 96 * 2, 4)
    assert 2 * count / 2**20 == pytest.approx(36, abs=0.1)
    assert 350e9 / (2 * count) == pytest.approx(10_000, rel=0.1)


def test_dropout_acts_on_the_adapters_input_alone():
    layer = LoRALinear(torch.nn.Linear(6, 4))
    layer.add("one", LoRAConfig(rank=2, alpha=2, dropout=0.5))
    x = torch.randn(3, 6)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero
    torch.nn.init.ones_(layer.adapters["one"].b)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "message, call",
    [
        ("rank: expected at least 1", lambda: LoRAConfig(rank=0, alpha=1)),
        ("dropout: expected from 0", lambda: LoRAConfig(rank=1, alpha=1, dropout=1.0)),
        ("targets: expected names", lambda: LoRAConfig(rank=1, alpha=1, targets="q_proj")),
        ("rank: expected at most 8", lambda: add_adapter(fresh(), LoRAConfig(rank=9, alpha=1))),
        ("targets: expected some of down_proj",
         lambda: add_adapter(fresh(), LoRAConfig(rank=1, alpha=1, targets=("query",)))),
        ("'default' is there already", lambda: add_adapter(add_adapter(fresh(), QV), QV)),
        ("expected some of default; got other",
         lambda: set_adapter(add_adapter(fresh(), QV), "other")),
        ("expected adapters, found none", lambda: merge(fresh())),
        ("unmerge: nothing is merged", lambda: unmerge(add_adapter(fresh(), QV))),
    ],
)  # fmt: skip
def test_rejects(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_rejects_what_merged_weights_forbid():
    model = learned(add_adapter(fresh(), QV))
    merge(model)
    with pytest.raises(ValueError, match="merged already"):
        merge(model)
    with pytest.raises(ValueError, match="unmerge first"):
        set_adapter(model, "default")
    with pytest.raises(ValueError, match="unmerge first"), use_rows(model, ["default"] * 3):
        pass


def test_rejects_a_broken_base():
    model = fresh()
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj: expected finite"):
        add_adapter(model, QV)
    assert not adapter_names(model)


def test_rejects_adapters_for_another_base(tmp_path):
    save_adapter(add_adapter(fresh(), QV), tmp_path)
    wider = Llama(LlamaConfig(vocab_size=40, dim=32, hidden_dim=24, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight: expected \(3, 32\).*another base"):
        load_adapter(wider, tmp_path)
    deeper = Llama(LlamaConfig(vocab_size=40, dim=16, hidden_dim=24, num_layers=3, num_heads=4))
    with pytest.raises(ValueError, match="differs in .*layers.2.*another base"):
        load_adapter(deeper, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_adapter(fresh(), tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(fresh(), tmp_path)
    with pytest.raises(ValueError, match="name: expected one of"):
        save_adapter(add_adapter(fresh(), QV), tmp_path, "other")
