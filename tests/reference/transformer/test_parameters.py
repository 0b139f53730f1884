import dataclasses

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.transformer import (
    PRESETS,
    Llama,
    LlamaConfig,
    bert_parameters,
    encoder_decoder_parameters,
    gpt_parameters,
    llama_parameters,
    mixtral_parameters,
    to_huggingface,
)
from reference.transformer.encoder_decoder import EncoderDecoder

PUBLISHED = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-33b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def count(build, *args, **kwargs):
    """Parameters of a module that takes no memory, each once."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(*args, **kwargs).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_matches_the_published_count(name):
    assert llama_parameters(PRESETS[name]).total == PUBLISHED[name]
    assert count(Llama, PRESETS[name]) == PUBLISHED[name]


def test_every_preset_is_counted():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3.2-1b"])
def test_matches_transformers(name):
    config = dataclasses.replace(PRESETS[name], num_layers=2)
    theirs = transformers.LlamaConfig(**to_huggingface(config))
    assert count(transformers.LlamaForCausalLM, theirs) == llama_parameters(config).total


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    sizes=st.tuples(*[st.integers(1, 20)] * 4),
    is_tied=st.booleans(),
)
def test_matches_the_module_of_any_shape(kv_heads, group, head_dim, sizes, is_tied):
    vocab_size, dim, hidden_dim, num_layers = sizes
    config = LlamaConfig(
        vocab_size=vocab_size,
        dim=dim,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * head_dim,
        is_tied=is_tied,
    )
    parts = llama_parameters(config)
    assert count(Llama, config) == parts.total == sum(parts)
    matrices = parts.total - parts.norms - (0 if is_tied else parts.embedding)
    assert parts.in_matrix_products == matrices - (parts.embedding if is_tied else 0)


GPT2 = {
    "small": (768, 12, 124_439_808),
    "medium": (1024, 24, 354_823_168),
    "large": (1280, 36, 774_030_080),
    "xl": (1600, 48, 1_557_611_200),
}


@pytest.mark.parametrize("size", GPT2)
def test_gpt2_matches_the_published_count(size):
    dim, num_layers, published = GPT2[size]
    assert gpt_parameters(dim=dim, num_layers=num_layers, context=1024) == published


def test_gpt2_matches_transformers():
    theirs = transformers.GPT2Config(n_layer=3)
    expected = count(transformers.GPT2LMHeadModel, theirs)
    assert gpt_parameters(dim=768, num_layers=3, context=1024) == expected


def test_gpt3_matches_the_paper():
    parameters = gpt_parameters(dim=12288, num_layers=96, context=2048)
    assert parameters == 174_604_259_328
    assert f"{parameters / 1e6:,.0f}"[:5] == "174,6"  # table D.1: 174,600M
    flops = 6 * parameters * 300e9
    assert f"{flops:.2e}" == "3.14e+23" and round(flops / 8.64e19, -1) == 3640


@pytest.mark.parametrize(
    "dim, num_layers, expected, printed",
    [(768, 12, 109_482_240, 110e6), (1024, 24, 335_141_888, 340e6)],
)
def test_bert_matches_the_paper_and_transformers(dim, num_layers, expected, printed):
    parameters = bert_parameters(dim=dim, num_layers=num_layers)
    assert parameters == expected == pytest.approx(printed, rel=0.02)
    theirs = transformers.BertConfig(
        hidden_size=dim, num_hidden_layers=num_layers, num_attention_heads=dim // 64,
        intermediate_size=4 * dim,
    )  # fmt: skip
    assert count(transformers.BertModel, theirs) == expected


@pytest.mark.parametrize(
    "dim, hidden_dim, heads, printed", [(512, 2048, 8, 65e6), (1024, 4096, 16, 213e6)]
)
def test_the_transformer_of_2017_nearly_matches_the_paper(dim, hidden_dim, heads, printed):
    sizes = {"dim": dim, "hidden_dim": hidden_dim, "num_layers": 6}
    parameters = encoder_decoder_parameters(**sizes, vocab_size=37000)
    assert parameters == pytest.approx(printed, rel=0.04)
    assert parameters == count(EncoderDecoder, 37000, **sizes, num_heads=heads)
    without = encoder_decoder_parameters(**sizes, vocab_size=37000, attention_bias=False)
    assert parameters - without == 18 * 4 * dim


def test_mixtral_matches_the_paper_and_transformers():
    config = LlamaConfig(
        vocab_size=32000, dim=4096, hidden_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8
    )
    both = mixtral_parameters(config, num_experts=8, experts_per_token=2)
    assert both == (46_702_792_704, 12_879_925_248)  # "46.7B" and "12.9B"
    theirs = transformers.MixtralConfig(num_hidden_layers=1)
    one = mixtral_parameters(
        dataclasses.replace(config, num_layers=1), num_experts=8, experts_per_token=2
    )
    assert count(transformers.MixtralForCausalLM, theirs) == one.total
