"""Oracles: peft's prefix tuning, prompt tuning and P-tuning; what a text in their place gives."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from reference.lora import PrefixTuning, PromptTuning, add_bottlenecks
from tests.reference.lora.test_lora import CONFIG, TOKENS, fresh, theirs_of
from tests.tolerances import TOLERANCE


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    return peft


def adapted(peft, config, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).eval()


@pytest.mark.parametrize("width", [None, 10])
def test_prefix_tuning_matches_peft(peft, tmp_path, width):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=width is not None,
        encoder_hidden_size=width,
    )  # fmt: skip
    # With grouped heads peft embeds for its projection at the width of keys, we at the model's.
    kv_heads = 2 if width is None else 4
    theirs = adapted(peft, config, theirs_of(fresh(num_kv_heads=kv_heads), tmp_path))
    their_encoder = theirs.prompt_encoder.default
    ours = PrefixTuning(fresh(num_kv_heads=kv_heads), 3, width)
    with torch.no_grad():
        if width is None:
            ours.embedding.weight.copy_(their_encoder.embedding.weight)
        else:
            ours.embedding.weight.copy_(their_encoder.embedding.weight)
            ours.encoder.load_state_dict(their_encoder.transform.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(TOKENS).logits
        assert_close(ours(TOKENS), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
def test_prompts_match_peft(peft, tmp_path, encoder):
    if encoder is None:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=10,
            encoder_reparameterization_type=encoder.upper(),
        )  # fmt: skip
    theirs = adapted(peft, config, theirs_of(fresh(), tmp_path))
    their_encoder = theirs.prompt_encoder.default
    ours = PromptTuning(fresh(), 3, encoder=encoder, encoder_width=10)
    with torch.no_grad():
        ours.embedding.weight.copy_(their_encoder.embedding.weight)
        if encoder == "mlp":
            ours.encoder.load_state_dict(their_encoder.mlp_head.state_dict())
        elif encoder == "lstm":
            ours.encoder.lstm.load_state_dict(their_encoder.lstm_head.state_dict())
            ours.encoder.mlp.load_state_dict(their_encoder.mlp_head.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(TOKENS).logits[:, -TOKENS.shape[1] :]
        assert_close(ours(TOKENS), expected, **TOLERANCE[torch.float32])


def test_a_prompt_of_real_tokens_is_that_text():
    model = fresh()
    text = torch.tensor([5, 7, 9])
    tuned = PromptTuning(fresh(), 3, initial_tokens=text)
    whole = torch.cat([text.expand(3, -1), TOKENS], 1)
    assert_close(tuned(TOKENS), model(whole)[:, 3:], **TOLERANCE[torch.float32])


def test_a_prefix_of_a_texts_keys_and_values_is_that_text():
    model, text = fresh(), torch.tensor([[5, 7, 9]])

    class Keeping:
        def __init__(self):
            self.kept = []

        def get_seq_length(self):
            return 0

        def update(self, k, v, layer):
            self.kept.append((k, v))
            return k, v

    cache = Keeping()
    model(text, cache=cache)
    tuned = PrefixTuning(fresh(), 3)
    with torch.no_grad():
        both = torch.stack([torch.stack(kv) for kv in cache.kept])  # (L, 2, 1, K, p, d)
        tuned.embedding.weight.copy_(both[:, :, 0].permute(3, 0, 1, 2, 4).reshape(3, -1))
    whole = torch.cat([text.expand(3, -1), TOKENS], 1)
    assert_close(tuned(TOKENS), model(whole)[:, 3:], **TOLERANCE[torch.float32])


@pytest.mark.parametrize("make", [PrefixTuning, PromptTuning])
def test_only_the_prompt_learns(make):
    tuned = make(fresh(), 3)
    tuned(TOKENS).sum().backward()
    assert [name for name, p in tuned.named_parameters() if p.grad is not None] == [
        "embedding.weight"
    ]


def test_prefix_parameters_of_the_formula():
    tuned = PrefixTuning(fresh(), 5)
    expected = 5 * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * CONFIG.head_dim
    assert tuned.embedding.weight.numel() == expected


def test_bottlenecks_begin_as_the_identity_and_then_learn():
    model = add_bottlenecks(fresh(), 4)
    assert torch.equal(model(TOKENS), fresh()(TOKENS))
    model(TOKENS).square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == 2 * CONFIG.num_layers * (2 * 4 * 16 + 4 + 16)
    assert all(p.grad is not None for p in learning)


@pytest.mark.parametrize(
    "message, call",
    [
        ("num_tokens: expected 1 to 63", lambda: PrefixTuning(fresh(), 0)),
        ("num_tokens: expected 1 to 63", lambda: PromptTuning(fresh(), 64)),
        ("encoder: expected 'mlp'", lambda: PromptTuning(fresh(), 2, encoder="gru")),
        ("initial_tokens: expected shape",
         lambda: PromptTuning(fresh(), 2, initial_tokens=torch.tensor([1]))),
        ("width: expected at least 1", lambda: add_bottlenecks(fresh(), 0)),
    ],
)  # fmt: skip
def test_rejects(message, call):
    with pytest.raises(ValueError, match=message):
        call()
