"""Adapter files against peft: each key equal or refused; adding and merging all or nothing."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from reference.lora import (
    LoRAConfig,
    add_adapter,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    unmerge,
)
from reference.lora.files import KEYS
from reference.transformer import Llama, LlamaConfig, from_huggingface, save_pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = torch.arange(14).view(2, 7)
SMALL = LlamaConfig(vocab_size=9, dim=8, hidden_dim=8, num_layers=2, num_heads=2)
# Values of every key that is honoured, and the values in which others ask for nothing.
VALUES = {
    "r": [1, 3], "lora_alpha": [5, 2.5], "lora_dropout": [0.25], "use_rslora": [True, False],
    "target_modules": [
        ["q_proj"], ["layers.1.self_attn.q_proj"], ["model.layers.0.mlp.up_proj", "lm_head"],
        ["lm_head"], "all-linear",
    ],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"], "task_type": ["CAUSAL_LM"],
    "bias": ["none"], "inference_mode": [True], "revision": ["main"],
}  # fmt: skip
REFUSED = {
    "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1}, "modules_to_save": ["lm_head"],
    "lora_bias": True, "bias": "all", "use_dora": True, "fan_in_fan_out": True,
    "layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["q_proj"],
    "layer_replication": [[0, 1], [0, 1]], "alora_invocation_tokens": [5], "use_qalora": True,
    "trainable_token_indices": [1], "target_parameters": ["w"], "megatron_config": {"tp": 2},
    "loftq_config": {"loftq_bits": 4}, "corda_config": {"x": 1}, "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1}, "use_bdlora": {"x": 1}, "velora_config": {"x": 1},
    "monteclora_config": {"x": 1}, "lora_ga_config": {"x": 1}, "eva_config": {"rho": 1.0},
    "ensure_weight_tying": True, "task_type": "SEQ_CLS", "a_key_of_next_year": 1, "r": "8",
}  # fmt: skip
BASE_CHANGING = ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "eva"]


def theirs_of(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(TheirConfig(**SIZES, **changes)).eval()
    model.set_attn_implementation("eager")
    return model


def ours_of(theirs):
    ours = Llama(from_huggingface(theirs.config.to_dict())).eval()
    state = theirs.state_dict()
    ours.load_state_dict({name.removeprefix("model."): state[name] for name in state})
    return ours


def adapted(theirs, **changes):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model):
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_the_values_cover_every_key_that_is_read():
    assert KEYS.honoured.keys() - {"peft_type"} <= VALUES.keys()
    written = peft.LoraConfig(target_modules=["q_proj"]).to_dict().keys()
    assert written <= KEYS.honoured.keys() | KEYS.plain.keys() | KEYS.harmless | REFUSED.keys()


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in VALUES.items() for value in values]
)
def test_matches_peft_there_and_back(tmp_path, key, value):
    base = theirs_of()
    theirs = adapted(base, **{key: value})
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = ours_of(base)
    config = load_adapter(ours, tmp_path / "theirs")
    assert torch.equal(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(theirs))
    back = load_adapter(ours_of(base), tmp_path / "ours")
    assert (back.rank, back.alpha, back.dropout, back.is_rank_stabilised) == (
        config.rank, config.alpha, config.dropout, config.is_rank_stabilised,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = add_adapter(Llama(SMALL), LoRAConfig(rank=2, alpha=2))
    save_adapter(model, tmp_path)
    return tmp_path


def changed(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def is_untouched(model):
    return not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("key", REFUSED)
def test_rejects_a_key_by_name(folder, key):
    model = Llama(SMALL)
    with pytest.raises(ValueError, match=f"{key}"):
        load_adapter(model, changed(folder, **{key: REFUSED[key]}))
    assert is_untouched(model)


@pytest.mark.parametrize("value", BASE_CHANGING)
def test_rejects_adapters_of_a_base_that_their_start_changed(folder, value):
    with pytest.raises(ValueError, match=f"init_lora_weights: expected .*, got '{value}'"):
        load_adapter(Llama(SMALL), changed(folder, init_lora_weights=value))


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_rejects_every_other_kind_of_adapter_by_name(folder, kind):
    if kind == "LORA":
        load_adapter(Llama(SMALL), folder)
        return
    model = Llama(SMALL)
    with pytest.raises(ValueError, match=f"peft_type: expected 'LORA', got '{kind}'"):
        load_adapter(model, changed(folder, peft_type=kind))
    assert is_untouched(model)


def test_rejects_tensors_beyond_a_and_b(tmp_path):
    """lora_bias and modules_to_save have tensors that a lenient reader would leave in the file."""
    base = theirs_of(attention_bias=True)
    theirs = adapted(base, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model = ours_of(theirs_of())
    with pytest.raises(ValueError, match="lora_B.bias"):
        load_adapter(model, changed(tmp_path, lora_bias=False))
    assert is_untouched(model)


@pytest.mark.parametrize("name", ["v1.0", "runs/a.b", "", "keys", "training", "forward"])
def test_rejects_a_name_that_no_module_may_have_and_changes_nothing(name):
    model = Llama(SMALL)
    with pytest.raises(ValueError, match="name: expected one that a module may have"):
        add_adapter(model, LoRAConfig(rank=2, alpha=2), name)
    assert is_untouched(model)


def test_rejects_a_second_adapter_while_merged_and_changes_nothing():
    model = add_adapter(Llama(SMALL), LoRAConfig(rank=2, alpha=2))
    merge(model)
    with pytest.raises(ValueError, match="add_adapter: the adapters are merged already"):
        add_adapter(model, LoRAConfig(rank=2, alpha=2, targets=("o_proj",)), "other")
    assert len(list(lora_layers(model))) == 4


def test_rejects_a_merge_into_a_tied_head_and_changes_nothing():
    """peft adds the head's change to the embedding as well (#2018)."""
    model = add_adapter(theirs_of(tie_word_embeddings=True), LoRAConfig(
        rank=2, alpha=2, targets=("q_proj", "lm_head")))  # fmt: skip
    for layer in lora_layers(model):
        nn.init.normal_(layer.adapters["default"].b)
    before = logits(model)
    with pytest.raises(ValueError, match="model.embed_tokens and lm_head.base share one"):
        merge(model)
    assert torch.equal(logits(model), before)
    head = model.lm_head.base
    head.weight = nn.Parameter(head.weight.detach().clone())
    merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), 1e30])
def test_invariant_a_merge_that_fails_leaves_every_weight(broken):
    model = add_adapter(Llama(SMALL).half(), LoRAConfig(rank=2, alpha=2))
    *_, last = lora_layers(model)
    for layer in lora_layers(model):
        nn.init.normal_(layer.adapters["default"].b)
    with torch.no_grad():
        last.adapters["default"].float().b.fill_(broken)
    before = [layer.weight.clone() for layer in lora_layers(model)]
    with pytest.raises(ValueError, match="merge: expected finite weights"):
        merge(model)
    after = [layer.weight for layer in lora_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(layer._unmerged is None for layer in lora_layers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_float64_rounded_once(dtype):
    """Three adapters, one rounding: in low precision each addition would round (peft #1035)."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(32, 32, dtype=dtype))
    exact = model.q_proj.weight.double()
    for name in "abc":
        add_adapter(model, LoRAConfig(rank=4, alpha=8), name)
        adapter = model.q_proj.adapters[name]
        nn.init.normal_(adapter.b, std=0.02)
        exact = exact + adapter.b.double() @ adapter.a.double() * 2
    before = model.q_proj.weight.clone()
    model.q_proj.active = ["a", "b", "c"]
    merge(model)
    off = (model.q_proj.weight != exact.to(dtype)).double().mean()
    assert off < 0.01  # float32's own rounding, at a tie
    unmerge(model)
    assert torch.equal(model.q_proj.weight, before)


def test_rejects_a_file_with_a_key_twice_and_a_broken_one(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "r": 4}')
    with pytest.raises(ValueError, match="a key twice: r"):
        load_adapter(Llama(SMALL), folder)


def test_rejects_saving_a_model_that_carries_adapters(tmp_path):
    with pytest.raises(ValueError, match="without adapters"):
        save_pretrained(add_adapter(Llama(SMALL), LoRAConfig(rank=2, alpha=2)), tmp_path)
    assert not list(tmp_path.iterdir())
