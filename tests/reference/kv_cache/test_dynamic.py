import pytest
import torch
from transformers import DynamicCache as TheirCache

from reference.kv_cache import DynamicCache


def new(tokens, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 3, tokens, 4, generator=generator).to(dtype).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matches_transformers(dtype):
    ours, theirs = DynamicCache(), TheirCache()
    for call, tokens in enumerate((5, 1, 0, 3)):
        for layer in range(2):
            k, v = new(tokens, dtype=dtype, seed=10 * call + layer)
            got, expected = ours.update(k, v, layer), theirs.update(k, v, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert got[0].dtype == dtype
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.nbytes == 2 * 2 * (2 * 3 * 9 * 4) * dtype.itemsize
    ours.crop(4)
    theirs.crop(-5)  # theirs counts what goes
    assert torch.equal(ours.keys[1], theirs.layers[1].keys)
    ours.select(torch.tensor([1, 1, 0]))
    theirs.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(ours.values[0], theirs.layers[0].values)


def test_invariant_empty_batch_and_strides():
    cache = DynamicCache()
    assert cache.update(*new(3, batch=0), 0)[0].shape == (0, 3, 3, 4)
    cache = DynamicCache()
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in new(3))
    assert torch.equal(cache.update(k, v, 0)[0], k)


def test_rejects_what_does_not_fit():
    cache = DynamicCache()
    k, v = new(2)
    cache.update(k, v, 0)
    for call, message in (
        (lambda: cache.update(k, v, 2), "layer: expected 0 to 1, got 2"),
        (lambda: cache.update(k[0], v[0], 0), r"k: expected \(batch, kv_heads"),
        (lambda: cache.update(k, v[:, :, :1], 0), "v: expected shape"),
        (lambda: cache.update(k[:1], v[:1], 0), "begin a new one"),
        (lambda: cache.crop(3), r"expected 0 to 2 \(those held\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"expected torch.float32 as the cache, got torch.float64"):
        cache.update(k.double(), v.double(), 0)
