import math

import pytest
import torch
import torch.nn.functional as F

from reference.flash_attention import (
    TwoLevelMemory,
    flash2_elements,
    flash2_forward,
    flash_elements,
    flash_forward,
    standard_elements,
    standard_forward,
    tile_sizes,
)
from tests.tolerances import TOLERANCE


def qkv(n, d):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("block_q, block_k", [(8, 8), (16, 5), (7, 64), (100, 100)])
def test_every_order_computes_attention(block_q, block_k):
    q, k, v = qkv(64, 8)
    expected = F.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)))[0, 0]
    for out in (
        standard_forward(TwoLevelMemory(), q, k, v),
        flash_forward(TwoLevelMemory(), q, k, v, block_q=block_q, block_k=block_k),
        flash2_forward(TwoLevelMemory(), q, k, v, block_q=block_q, block_k=block_k),
    ):
        torch.testing.assert_close(out, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("n, d, block_q, block_k", [(64, 8, 16, 16), (60, 4, 7, 13), (5, 2, 9, 9)])
def test_counts_match_the_closed_forms(n, d, block_q, block_k):
    q, k, v = qkv(n, d)
    for run, elements in (
        (lambda m: standard_forward(m, q, k, v), standard_elements(n, d)),
        (
            lambda m: flash_forward(m, q, k, v, block_q=block_q, block_k=block_k),
            flash_elements(n, d, block_k),
        ),
        (
            lambda m: flash2_forward(m, q, k, v, block_q=block_q, block_k=block_k),
            flash2_elements(n, d, block_q),
        ),
    ):
        memory = TwoLevelMemory(element_bytes=2)
        run(memory)
        assert memory.traffic_bytes == 2 * elements


def test_traffic_falls_as_sram_grows():
    """Theorem 2: N^2 d^2 / M, a line of slope -1 over log M while a pass is many blocks."""
    sizes = [2**k for k in range(13, 18)]
    traffic = [flash_elements(16384, 64, tile_sizes(m, 64)[1]) for m in sizes]
    slopes = [math.log2(b / a) for a, b in zip(traffic, traffic[1:], strict=False)]
    assert all(-1.1 < slope < -0.9 for slope in slopes)


def test_the_papers_tiles_fit_its_sram():
    q, k, v = qkv(96, 16)
    for sram in (1024, 2048, 8192):
        block_q, block_k = tile_sizes(sram, 16)
        memory = TwoLevelMemory(sram_bytes=2 * sram)  # the paper's M leaves out S and copies
        flash_forward(memory, q, k, v, block_q=block_q, block_k=block_k)
        assert memory.peak_bytes <= 2 * sram


def test_matches_the_papers_table_for_gpt2():
    """arXiv 2205.14135 v2, fig. 2: 4.4 GB for FlashAttention, fwd + bwd; 40.3 GB for standard."""
    heads = 64 * 16
    flash = flash_elements(1024, 64, 384) + flash_elements(1024, 64, 384, backward=True)
    standard = standard_elements(1024, 64) + standard_elements(1024, 64, backward=True)
    assert 2 * heads * flash / 1e9 == pytest.approx(4.4, rel=0.1)
    assert 2 * heads * standard / 1e9 == pytest.approx(25.2, rel=0.01)  # without mask and dropout


def test_rejects_tiles_that_do_not_fit():
    q, k, v = qkv(64, 8)
    memory = TwoLevelMemory(sram_bytes=1000)
    with pytest.raises(MemoryError, match="expected at most 1000 bytes"):
        flash_forward(memory, q, k, v, block_q=32, block_k=32)
    with pytest.raises(
        ValueError, match="sram_bytes: expected at least 512 for head_dim=64, got 100"
    ):
        tile_sizes(100, 64)
