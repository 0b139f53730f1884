"""The loader and its captures, beside transformers' own outputs and attention recomputed."""

import math

import pytest
import torch
import torch.nn.functional as F

from reference import pretrained
from tests.tolerances import TOLERANCE

CLOSE = {key: 20 * value for key, value in TOLERANCE[torch.float32].items()}  # 30 layers deep

needs_model = pytest.mark.skipif(
    not (pretrained.SMOLLM2 / "model.safetensors").is_file(), reason="needs `make model`"
)


@pytest.fixture(scope="module")
def smollm2():
    torch.set_num_threads(1)
    return pretrained.load_smollm2()


@pytest.fixture(scope="module")
def input_ids(smollm2):
    return smollm2[1](pretrained.passage(), return_tensors="pt").input_ids[:, :64]


def test_passage_is_a_page_of_english():
    text = pretrained.passage()
    assert text.startswith("Alice was beginning") and text.endswith("under the hedge.")
    assert text.isascii() and len(text.split()) == 253


def test_corpus_is_long_and_the_same_each_time():
    text = pretrained.corpus()
    assert len(text) > 300_000 and text == pretrained.corpus()
    assert text.isprintable() or "\n" in text


def test_rejects_missing_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="make model"):
        pretrained.load_smollm2(tmp_path)


@needs_model
def test_model_is_float32_eager_in_eval_mode(smollm2):
    model, _ = smollm2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and model.config._attn_implementation == "eager"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@needs_model
def test_loading_prints_nothing(capfd):
    pretrained.load_smollm2()
    assert capfd.readouterr() == ("", "")


@needs_model
@pytest.mark.parametrize(
    ("prompt", "word"),
    [("The capital of France is", " Paris"), ("The chemical formula of water is", " H")],
)
def test_model_knows_english(smollm2, prompt, word):
    model, tokenizer = smollm2
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == word


@needs_model
def test_passage_has_a_perplexity_of_a_trained_model(smollm2, input_ids):
    model, _ = smollm2
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss.item()
    assert loss < 4 < math.log(model.config.vocab_size) - 6


@needs_model
def test_tokenizer_round_trips_the_passage(smollm2):
    _, tokenizer = smollm2
    ids = tokenizer(pretrained.passage()).input_ids
    assert tokenizer.decode(ids) == pretrained.passage()
    assert 200 <= len(ids) <= 350


@needs_model
def test_capture_gives_what_a_submodule_takes_and_returns(smollm2, input_ids):
    model, _ = smollm2
    names = ["model.embed_tokens", "model.layers.3", "model.layers.3.input_layernorm",
             "model.layers.3.self_attn", "model.norm"]  # fmt: skip
    seen = pretrained.capture(model, input_ids, names)
    assert list(seen) == names
    with torch.no_grad():
        hidden = model.model(input_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen["model.embed_tokens"].output, hidden[0], rtol=0, atol=0)
    torch.testing.assert_close(seen["model.layers.3"].input, hidden[3], rtol=0, atol=0)
    torch.testing.assert_close(seen["model.layers.3"].output, hidden[4], rtol=0, atol=0)
    torch.testing.assert_close(seen["model.norm"].output, hidden[-1], rtol=0, atol=0)
    norm = seen["model.layers.3.input_layernorm"]
    torch.testing.assert_close(seen["model.layers.3.self_attn"].input, norm.output, rtol=0, atol=0)
    weight = model.model.layers[3].input_layernorm.weight
    torch.testing.assert_close(norm.output, F.rms_norm(norm.input, (576,), weight, 1e-5), **CLOSE)


@needs_model
def test_capture_leaves_no_hooks_behind(smollm2, input_ids):
    model, _ = smollm2
    before = [len(m._forward_hooks) for m in model.modules()]
    pretrained.capture(model, input_ids, ["model.norm"])
    assert [len(m._forward_hooks) for m in model.modules()] == before
    with pytest.raises(IndexError):
        pretrained.capture(model, input_ids + 10**6, ["model.norm"])
    assert [len(m._forward_hooks) for m in model.modules()] == before


@needs_model
def test_rejects_unknown_names_and_layers(smollm2, input_ids):
    model, _ = smollm2
    with pytest.raises(ValueError, match="no submodule 'model.layers.30'"):
        pretrained.capture(model, input_ids, ["model.layers.30"])
    with pytest.raises(ValueError, match="layer: expected 0 to 29, got 30"):
        pretrained.capture_attention(model, input_ids, 30)


@needs_model
@pytest.mark.parametrize("layer", [0, 17, 29])
def test_captured_q_k_v_reproduce_attention(smollm2, input_ids, layer):
    model, _ = smollm2
    q, k, v, probabilities, output = pretrained.capture_attention(model, input_ids, layer)
    assert q.shape == (1, 9, 64, 64) and k.shape == v.shape == (1, 3, 64, 64)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), output, **CLOSE
    )
    scores = q @ k.repeat_interleave(3, dim=1).mT / 8
    scores = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), probabilities, **CLOSE)


@needs_model
def test_attention_maps_are_causal_and_sum_to_one(smollm2, input_ids):
    maps = pretrained.attention_maps(smollm2[0], input_ids)
    assert maps.shape == (30, 1, 9, 64, 64)
    assert maps.triu(1).count_nonzero() == 0
    torch.testing.assert_close(maps.sum(-1), torch.ones(30, 1, 9, 64))
