"""Production code to compare with; importing it warns of torch's deprecated TorchScript."""

import warnings

import pytest
import torch


@pytest.fixture(scope="session")
def bnb():
    """bitsandbytes.functional, with whatever it compiles at its first call already compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as functional

        packed, state = functional.quantize_4bit(torch.ones(64), compress_statistics=True)
        functional.dequantize_4bit(packed, state)
    return functional


@pytest.fixture(scope="session")
def ao(torchao):
    """What of torchao is compared: its AWQ observer, and how it quantises a weight."""
    from types import SimpleNamespace

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.awq.core import AWQObserver
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER
        from torchao.utils import DummyModule

    def rounding(weight, config):
        module = _QUANTIZE_CONFIG_HANDLER[type(config)](DummyModule(weight), config)
        return module.weight.dequantize()

    def intx(bits, group_size, mapping):
        dtype = getattr(torch, f"int{bits}")
        kind = getattr(MappingType, mapping)
        return IntxWeightOnlyConfig(
            weight_dtype=dtype, granularity=PerGroup(group_size), mapping_type=kind
        )

    return SimpleNamespace(
        Observer=AWQObserver, rounding=rounding, intx=intx, int8=Int8WeightOnlyConfig
    )
