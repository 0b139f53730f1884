"""Oracles: parameter counts that papers and repositories print, and models that are built."""

import pytest
import torch

from reference.parallel.planner import gpt_shape, llama_shape
from reference.parallel.planner.published import NARAYANAN_1
from reference.parallel.planner.published_mpt import PARAMETERS, SIZES, VOCAB_SIZE
from reference.parallel.tensor.gpt import GPTLayer
from reference.transformer import PRESETS, Llama, LlamaConfig, forward_flops, llama_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_matches_the_counts_of_chapter_05(name):
    assert llama_shape(PRESETS[name]).num_parameters == llama_parameters(PRESETS[name]).total


@pytest.mark.parametrize("size", SIZES)
def test_matches_the_parameters_that_mosaicml_prints(size):
    dim, layers, heads = SIZES[size]
    shape = gpt_shape(dim, layers, heads, vocab_size=VOCAB_SIZE, context=2048)
    assert shape.num_parameters == PARAMETERS[size]


@pytest.mark.parametrize("billions", NARAYANAN_1)
def test_matches_the_parameters_of_narayanan(billions):
    heads, dim, layers, *_ = NARAYANAN_1[billions]
    shape = gpt_shape(dim, layers, heads)
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.051)


def test_gpt_layer_has_the_parameters_of_chapter_13s():
    layer = GPTLayer(32, 4)
    shape = gpt_shape(32, 1, 4)
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_stages_have_the_whole_models_parameters(is_tied):
    config = LlamaConfig(
        vocab_size=50, dim=16, hidden_dim=24, num_layers=5, num_heads=4, num_kv_heads=2,
        is_tied=is_tied,
    )  # fmt: skip
    shape = llama_shape(config)
    parts = [
        shape.parameters_of(n, is_first=i == 0, is_last=i == 2) for i, n in enumerate((2, 2, 1))
    ]
    copies = 50 * 16 if is_tied else 0
    assert sum(parts) == shape.num_parameters + copies
    with torch.device("meta"):
        whole = sum(p.numel() for p in Llama(config).parameters())
    assert shape.parameters_of(5, is_first=True, is_last=True) == whole


def test_flops_match_chapter_05():
    config = PRESETS["llama-3.1-8b"]
    shape, tokens = llama_shape(config), 4096
    ours = config.num_layers * (
        shape.layer_flops(tokens) + shape.pair_flops() * tokens**2
    ) + shape.head_flops(tokens)
    assert ours == forward_flops(config, tokens)


def test_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads=3, got 16"):
        gpt_shape(16, 1, 3)
