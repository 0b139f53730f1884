"""Oracles: the published figures, and the bytes of tensors."""

import pytest
import torch

from reference.quantization import (
    NF4_BITS,
    QLORA_BITS,
    adapter_fine_tuning_bytes,
    bits_per_parameter,
    double_quantize_4bit,
    full_fine_tuning_bytes,
    quantize_4bit,
)
from reference.transformer import PRESETS, llama_parameters


def test_double_quantization_matches_the_paper():
    """QLoRA, sec. 3: 0.5 becomes 0.127 bits, saving 0.373."""
    assert NF4_BITS == 4.5
    assert QLORA_BITS - 4 == pytest.approx(0.127, abs=5e-4)
    assert NF4_BITS - QLORA_BITS == pytest.approx(0.373, abs=5e-4)


def test_matches_the_bytes_of_tensors():
    x = torch.ones(1024, 1024)
    single, double = quantize_4bit(x), double_quantize_4bit(x)
    assert (single.packed.nbytes + single.absmax.nbytes) * 8 / x.numel() == NF4_BITS
    scales = double.scales
    stored = double.weights.packed.nbytes + scales.codes.nbytes + scales.absmax.nbytes
    assert stored * 8 / x.numel() == QLORA_BITS


def test_65_billion_match_the_paper():
    """QLoRA's abstract: from more than 780 GB to less than 48 GB."""
    assert full_fine_tuning_bytes(65e9).total == 780e9
    size = llama_parameters(PRESETS["llama-1-65b"]).total
    qlora = adapter_fine_tuning_bytes(size, 0.002 * size, weight_bits=QLORA_BITS)
    assert 33e9 < qlora.weights < 34e9 and qlora.total < 48e9


def test_adapters_cost_what_they_train():
    lora = adapter_fine_tuning_bytes(1000, 10)
    assert lora == (2000, 20, 20, 80) and lora.total == 2120
    assert full_fine_tuning_bytes(1000) == (2000, 0, 2000, 8000)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="expected more than 0, got 4, 0, None"):
        bits_per_parameter(block_size=0)
    with pytest.raises(ValueError, match="weight_bits: expected more than 0, got 0"):
        adapter_fine_tuning_bytes(1, 1, weight_bits=0)
