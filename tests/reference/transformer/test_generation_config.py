"""generation_config.json beside transformers' GenerationConfig: read alike, written alike."""

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from reference.pretrained import SMOLLM2
from reference.transformer import Llama, LlamaConfig, save_pretrained
from reference.transformer.generation_config import (
    KEYS,
    GenerationSettings,
    from_entries,
    load_generation_settings,
    save_generation_settings,
    to_entries,
)
from reference.transformer.sampling import filter_logits, generate, greedy
from tests.tolerances import TOLERANCE

DEFAULTS = GenerationConfig._get_default_generation_params()


def test_every_key_of_transformers_is_honoured_plain_harmless_or_refused():
    """Its defaults change nothing; any other value of a key that is not read is refused by name."""
    from_entries({k: v for k, v in DEFAULTS.items() if k in {**KEYS.honoured, **KEYS.plain}})
    for key in GenerationConfig().to_dict():
        if key not in KEYS.honoured and key not in KEYS.harmless:
            with pytest.raises(ValueError, match=f"generation_config.json: {key}"):
                from_entries({key: 7.25})
    assert from_entries({}) == GenerationSettings(top_k=DEFAULTS["top_k"])


@pytest.mark.parametrize(
    "entries",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},  # Llama 2's and 3's
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": [5, 7]},
        {"do_sample": True, "top_k": 0},
        {"eos_token_id": 2, "max_length": 4096},
        {"max_new_tokens": 16},
        {},
    ],
)
def test_round_trips_through_transformers(entries, tmp_path):
    settings = from_entries(entries)
    save_generation_settings(tmp_path, settings)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    for key, value in entries.items():
        assert getattr(theirs, key) == value
    theirs.save_pretrained(tmp_path)
    assert load_generation_settings(tmp_path) == settings
    assert from_entries(to_entries(settings)) == settings


@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"temperature": 0.5, "top_p": 0.8}])
def test_matches_transformers_distribution(cuts):
    """Without a top_k in the file, the 50 most likely tokens are left: their default."""
    settings = from_entries({"do_sample": True, **cuts})
    logits = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(settings.temperature),
            TopKLogitsWarper(settings.top_k),
            TopPLogitsWarper(settings.top_p),
        ]
    )
    ours = filter_logits(logits, **settings._cuts).softmax(-1)
    torch.testing.assert_close(ours, warpers(None, logits).softmax(-1), **TOLERANCE[torch.float32])
    assert (ours > 0).sum(-1).max() <= settings.top_k
    drawn = settings.chooser(torch.Generator().manual_seed(1))(logits)
    assert (ours.gather(1, drawn[:, None]) > 0).all()


def test_matches_transformers_generate_with_several_ends(tmp_path):
    torch.manual_seed(0)
    ours = Llama(
        LlamaConfig(vocab_size=31, dim=16, hidden_dim=20, num_layers=2, num_heads=4)
    ).eval()
    save_pretrained(ours, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.tensor([[1, 5, 9]])
    free = generate(ours, prompt, 8)[0, 3:].tolist()
    settings = from_entries({"eos_token_id": sorted({free[3], free[5]}), "max_length": 11})
    got = generate(ours, prompt, settings.room(3), choose=settings.chooser(), stop=settings.stop)
    expected = theirs.generate(
        prompt, generation_config=GenerationConfig(**to_entries(settings), pad_token_id=0)
    )
    assert got.tolist() == expected.tolist()


@pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(), reason="needs `make model`")
def test_reads_what_ships_with_the_model():
    settings = load_generation_settings(SMOLLM2)
    assert settings == GenerationSettings(stop_tokens=(2,))
    assert settings.chooser() is greedy


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty: expected 1, got 1.1"),
        ({"num_beams": 4}, "num_beams: expected 1, got 4"),
        ({"min_p": 0.1}, "min_p=0.1 not known here"),
        ({"temperature": -1}, "temperature: expected at least 0"),
        ({"top_p": 0}, "top_p: expected a value in"),
        ({"eos_token_id": [3, -1]}, "eos_token_id: expected ids from 0 on, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"do_sample": "yes"}, "do_sample: expected bool or null"),
    ],
)
def test_rejects(entries, message):
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        from_entries(entries)


def test_rejects_a_prompt_without_room():
    with pytest.raises(ValueError, match="prompt_len: expected less than max_length, 4, got 4"):
        from_entries({"max_length": 4}).room(4)
