import pytest
import torch

from reference.attention import scaled_dot_product_attention
from reference.flash_attention import paged_attention
from reference.kv_cache import BlockManager, DynamicCache, PagedCache
from tests.reference.kv_cache.test_branching import paged
from tests.tolerances import TOLERANCE


def test_matches_contiguous_on_the_course_model(course):
    """Sequences of different lengths grow in turns, so that their blocks lie mixed."""
    model, ids = course
    cache = paged(model)
    texts = {"a": ids[:13], "b": ids[100:105], "c": ids[300:322]}
    contiguous = {name: DynamicCache() for name in texts}
    for name, text in texts.items():
        cache.blocks.allocate(name, text.tolist())
        batch = cache.batch([name], len(text))
        got = model(text[None], batch.positions, batch, mask=batch.mask)
        expected = model(text[None], cache=contiguous[name])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for step in range(6):
        for name in texts:
            assert cache.blocks.append(name) == []
        tokens = torch.stack([ids[500 + step], ids[600 + step], ids[700 + step]])[:, None]
        batch = cache.batch(list(texts), 1)
        got = model(tokens, batch.positions, batch, mask=batch.mask)
        for row, name in enumerate(texts):
            expected = model(tokens[row : row + 1], cache=contiguous[name])
            torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    tables = cache.blocks.tables
    assert any(b - a != 1 for table in tables.values() for a, b in zip(table, table[1:]))  # noqa: B905


def test_flat_batch_matches_contiguous(course):
    """A prompt, a prompt behind a shared beginning, a single token: one row through the model."""
    model, ids = course
    cache = paged(model)
    blocks = cache.blocks
    first, grown = ids[:10], ids[100:107]
    for name, text in (("first", first), ("grown", grown[:-1])):
        blocks.allocate(name, text.tolist())
        batch = cache.batch([name], len(text))
        model(text[None], batch.positions, batch, mask=batch.mask)
    blocks.publish("first", first.tolist())
    alike = torch.cat((first[:8], ids[300:305]))
    new = ids[200:206]
    assert blocks.allocate("alike", alike.tolist()) == 8
    blocks.allocate("new", new.tolist())
    blocks.append("grown")
    batch = cache.flat_batch(["alike", "new", "grown"], [5, 6, 1])
    tokens = batch.row([alike[8:], new, grown[-1:]])
    got = model(tokens, batch.positions, batch, mask=batch.mask, num_logits=3)[0]
    for row, text in zip(got, (alike, new, grown), strict=True):
        expected = model(text[None], num_logits=1)[0, 0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"num_new: expected 1 to 6 \(tokens held\), got 7"):
        cache.flat_batch(["new"], [7])
    with pytest.raises(ValueError, match="expected a number for each of 2 sequences"):
        cache.flat_batch(["new", "grown"], [1])


def test_matches_the_kernel_that_reads_blocks_where_they_lie():
    blocks = BlockManager(9, 4)
    cache = PagedCache(blocks, num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    for name, length in (("a", 9), ("b", 3), ("c", 1)):
        blocks.allocate(name, range(100 * length, 101 * length))
    blocks.append("a", 4)
    generator = torch.Generator().manual_seed(0)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    batch = cache.batch(["a", "b", "c"], 1)
    k, v = torch.randn(2, 3, 2, 1, 8, dtype=torch.float64, generator=generator)
    q = torch.randn(3, 6, 1, 8, dtype=torch.float64, generator=generator)
    gathered = batch.update(k, v, 0)
    expected = scaled_dot_product_attention(q, *gathered, batch.mask)
    got = paged_attention(q, cache.keys[0], cache.values[0], batch.tables, batch.lengths)
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.float64])


def test_invariant_a_fork_does_not_see_its_siblings(course):
    model, ids = course
    cache = paged(model)
    cache.blocks.allocate("a", ids[:6].tolist())
    batch = cache.batch(["a"], 6)
    model(ids[None, :6], batch.positions, batch, mask=batch.mask)
    cache.blocks.fork("a", "b")
    before = cache.keys[:, cache.blocks.tables["a"]].clone()
    copies = cache.blocks.append("b")
    assert len(copies) == 1
    cache.copy(copies)
    batch = cache.batch(["b"], 1)
    model(ids[None, 9:10], batch.positions, batch, mask=batch.mask)
    assert torch.equal(cache.keys[:, cache.blocks.tables["a"]], before)
    alone = DynamicCache()
    model(torch.cat((ids[:6], ids[9:10]))[None], cache=alone)
    held = cache.keys[0, cache.blocks.tables["b"]].flatten(0, 1)[:7].transpose(0, 1)
    torch.testing.assert_close(held, alone.keys[0][0], rtol=1e-4, atol=1e-5)


def test_invariant_pools_and_dtypes():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cache = PagedCache(
            BlockManager(5, 4), num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype
        )
        assert cache.nbytes == 2 * 2 * 5 * 4 * 3 * 8 * dtype.itemsize
        cache.blocks.allocate(0, [1, 2, 3])
        k = torch.ones(1, 3, 3, 8, dtype=dtype)
        batch = cache.batch([0], 3)
        keys, _ = batch.update(k, k, 1)
        assert keys.dtype == dtype and torch.equal(keys, k) and batch.get_seq_length() == 0


def test_rejects_batches_and_shapes():
    cache = PagedCache(BlockManager(5, 4), num_layers=1, num_kv_heads=2, head_dim=8)
    cache.blocks.allocate(0, [1, 2, 3])
    with pytest.raises(ValueError, match="names: expected at least one sequence"):
        cache.batch([], 1)
    with pytest.raises(ValueError, match=r"num_new: expected 1 to 3 \(tokens held\), got 4"):
        cache.batch([0], 4)
    with pytest.raises(KeyError):
        cache.batch(["unknown"], 1)
    wrong = torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match=r"k: expected shape \(1, 2, 3, 8\), got \(1, 2, 2, 8\)"):
        cache.batch([0], 3).update(wrong, wrong, 0)
