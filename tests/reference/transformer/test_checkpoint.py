import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from reference.positions import RopeScaling
from reference.transformer import (
    Llama,
    LlamaConfig,
    load_config,
    load_pretrained,
    save_pretrained,
    to_huggingface,
)

TINY = LlamaConfig(
    vocab_size=50, dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=32
)
TOKENS = torch.arange(14).view(2, 7)
EAGER = {"attn_implementation": "eager", "local_files_only": True}


def make_model(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    return Llama(dataclasses.replace(TINY, **changes)).to(dtype).eval()


@pytest.fixture(autouse=True)
def no_progress_bar():
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    save_pretrained(make_model(), tmp_path)
    return tmp_path


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_matches_transformers_reading_what_we_wrote(tmp_path, is_tied, max_shard_bytes):
    ours = make_model(is_tied=is_tied, rope_scaling=RopeScaling("llama3", 8.0, 16))
    save_pretrained(ours, tmp_path, max_shard_bytes=max_shard_bytes)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 4000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    assert type(theirs) is LlamaForCausalLM
    assert torch.equal(ours(TOKENS), theirs(TOKENS).logits)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_matches_transformers_writing_what_we_read(tmp_path, is_tied, max_shard_size):
    torch.manual_seed(1)
    config = TheirConfig(**to_huggingface(dataclasses.replace(TINY, is_tied=is_tied)))
    config._attn_implementation = "eager"
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "4KB")
    ours = load_pretrained(tmp_path)
    assert not ours.training and ours.config.is_tied == is_tied
    assert torch.equal(ours(TOKENS), theirs(TOKENS).logits)


def test_index_matches_transformers(tmp_path):
    ours = make_model()
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=4000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    indices = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text())
        for side in ("ours", "theirs")
    )
    ours_index, theirs_index = indices
    assert ours_index["weight_map"].keys() == theirs_index["weight_map"].keys()
    assert ours_index["metadata"]["total_size"] == theirs_index["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_survives(tmp_path, dtype):
    model = make_model(dtype=dtype)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    again = load_pretrained(tmp_path)
    assert again.norm.weight.dtype == dtype and torch.equal(again(TOKENS), model(TOKENS))
    assert load_pretrained(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_loaded_model_trains_and_saves_onto_itself(folder):
    model = load_pretrained(folder).train()
    assert all(p.requires_grad for p in model.parameters())
    model(TOKENS).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    save_pretrained(model, folder)
    assert torch.equal(load_pretrained(folder)(TOKENS), model(TOKENS))


def test_a_new_save_replaces_the_older_files(folder):
    other = make_model(seed=1)
    (folder / "tokenizer.json").write_text("{}")
    for size in (4000, 3000, 10**9):
        save_pretrained(other, folder, max_shard_bytes=size)
        assert torch.equal(load_pretrained(folder)(TOKENS), other(TOKENS))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    before = weights_of(folder)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("reference.transformer.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make_model(seed=1), folder)
    after = weights_of(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not list(folder.glob(".*"))


def test_entries_of_the_caller_are_kept(tmp_path):
    save_pretrained(make_model(), tmp_path, entries={"eos_token_id": 7})
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).config.eos_token_id == 7
    assert load_config(tmp_path) == TINY


def test_older_extras_are_passed_over(tmp_path):
    model = make_model(is_tied=True)
    save_pretrained(model, tmp_path)
    tensors = weights_of(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(TOKENS), model(TOKENS))


def test_rejects_a_tied_head_of_its_own(tmp_path):
    save_pretrained(make_model(is_tied=True), tmp_path)
    tensors = weights_of(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(tmp_path)


def change_missing(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]


def change_extra(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)


def change_shape(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (change_missing, "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight"),
        (change_extra, "1 unexpected: model.layers.2.mlp.up_proj.weight"),
        (change_shape, r"1 misshapen: model.*k_proj.weight: expected \(8, 16\), got \(16, 16\)"),
    ],
)
def test_rejects_tensors_that_do_not_fit(folder, change, message):
    tensors = weights_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 300, -1])
def test_rejects_a_file_that_is_cut_off(folder, num_bytes):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match="not a whole safetensors file .*; fetch it again"):
        load_pretrained(folder)


def test_rejects_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_pretrained(tmp_path / "nowhere")
    save_pretrained(make_model(), tmp_path, max_shard_bytes=4000)
    (tmp_path / "model-00001-of-00004.safetensors").unlink(missing_ok=True)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="index.json names it; fetch it again"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "expected an object, got list"),
        ("config.json", '{"model_type": "gpt2"}', "model_type: expected 'llama', got 'gpt2'"),
        ("model.safetensors.index.json", "{}", "expected a 'weight_map'"),
    ],
)
def test_rejects_broken_json(folder, name, text, message):
    (folder / name).write_text(text)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_rejects_a_shard_size_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes: expected at least 1, got 0"):
        save_pretrained(make_model(), tmp_path, max_shard_bytes=0)


def test_matches_transformers_where_only_the_tied_head_is_stored(tmp_path):
    """safetensors.save_model keeps one of two names of a tensor."""
    from safetensors.torch import save_model

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        TheirConfig(**to_huggingface(dataclasses.replace(TINY, is_tied=True)))
    )
    theirs.config.save_pretrained(tmp_path)
    save_model(theirs, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in weights_of(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    assert torch.equal(load_pretrained(tmp_path)(TOKENS), again(TOKENS).logits)


def test_a_head_tied_by_hand_stays_tied(tmp_path):
    model = make_model()
    model.lm_head.weight = model.embed_tokens.weight
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config.is_tied and torch.equal(again(TOKENS), model(TOKENS))
    model.layers[0].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match="up_proj.weight: expected memory of its own"):
        save_pretrained(model, tmp_path)
    assert torch.equal(load_pretrained(tmp_path)(TOKENS), again(TOKENS))


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def moved(index):
    where = index["weight_map"]
    first, *_, last = where
    where[first], where[last] = where[last], where[first]


def forgotten(index):
    index["weight_map"].pop("model.norm.weight")


def elsewhere(index):
    index["weight_map"]["model.norm.weight"] = "../model-00001-of-00002.safetensors"


def unknown(index):
    index["quantization"] = {"bits": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        (moved, "the index is of another save"),
        (forgotten, "differs in model.norm.weight; the index is of another save"),
        (elsewhere, "expected names of files here"),
        (unknown, "quantization={'bits': 4} not known here"),
    ],
)
def test_rejects_an_index_of_another_save(tmp_path, change, message):
    save_pretrained(make_model(), tmp_path, max_shard_bytes=4000)
    index = index_of(tmp_path)
    change(index)
    write_index(tmp_path, index)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_rejects_two_saves_in_one_folder(tmp_path):
    """transformers reads model.safetensors, others follow the index that an older save left."""
    save_pretrained(make_model(seed=1), tmp_path / "old", max_shard_bytes=4000)
    save_pretrained(make_model(seed=2), tmp_path / "new")
    for path in (tmp_path / "old").glob("model*"):
        path.rename(tmp_path / "new" / path.name)
    with pytest.raises(ValueError, match="got both, of which readers take one or the other"):
        load_pretrained(tmp_path / "new")
    save_pretrained(make_model(seed=3), tmp_path / "new")
    assert torch.equal(load_pretrained(tmp_path / "new")(TOKENS), make_model(seed=3)(TOKENS))


def test_a_save_that_fails_at_the_last_file_leaves_all_old_ones(tmp_path, monkeypatch):
    old = make_model(seed=1)
    save_pretrained(old, tmp_path, max_shard_bytes=4000)
    names = {path.name for path in tmp_path.iterdir()}

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr("reference.transformer.checkpoint.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make_model(seed=2), tmp_path, max_shard_bytes=4000)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert torch.equal(load_pretrained(tmp_path)(TOKENS), old(TOKENS))


def test_rejects_entries_that_describe_another_model(tmp_path):
    for entries in ({"num_hidden_layers": 3}, {"sliding_window": 8}, {"rope_theta": 5.0}):
        with pytest.raises(ValueError, match="entries|not known here|which is it"):
            save_pretrained(make_model(), tmp_path, entries=entries)
    assert not list(tmp_path.iterdir())


def test_rejects_quantised_tensors(folder):
    tensors = weights_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight: expected a floating point dtype"):
        load_pretrained(folder)
