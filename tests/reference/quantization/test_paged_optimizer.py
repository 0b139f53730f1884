"""Oracles: torch's AdamW bit for bit, a cache simulation in plain Python, the budget."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.quantization import OutOfDeviceMemory, PagedAdamW, PagedMemory
from reference.transformer.optimizer import AdamW

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 13), (), (64,), (5, 3, 2), (0,)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def train(params, optimizers, num_steps=5, reserve=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for group in zip(*params, strict=True):
            gradient = torch.randn(group[0].shape, generator=generator).to(group[0].dtype)
            for parameter in group:
                parameter.grad = gradient.clone()
        if reserve:
            memory, num_bytes = reserve
            with memory.reserve(num_bytes):
                pass
        for optimizer in optimizers:
            optimizer.step()


@given(st.integers(1, 60), st.integers(4, 200), st.booleans())
@settings(deadline=None, max_examples=25)
def test_matches_torch_bit_for_bit_under_any_budget(num_pages, numbers_a_page, is_squeezed):
    page_bytes = 4 * numbers_a_page
    memory = PagedMemory(num_pages * page_bytes, page_bytes)
    ours, theirs = parameters(), parameters()
    optimizer, oracle = PagedAdamW(ours, memory, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    squeeze = (memory, memory.budget_bytes) if is_squeezed else None
    train([ours, theirs], [optimizer, oracle], reserve=squeeze)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        if a.numel():
            m, v = optimizer.moments(a)
            assert torch.equal(m, oracle.state[b]["exp_avg"])
            assert torch.equal(v, oracle.state[b]["exp_avg_sq"])
    assert memory.peak_bytes <= memory.budget_bytes
    assert memory.used_bytes == sum(page.nbytes for page in memory.on_device.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_matches_torch_in_other_dtypes(dtype):
    memory = PagedMemory(64, 64)
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    oracle = torch.optim.AdamW(theirs, **OPTIONS, foreach=False)
    train([ours, theirs], [PagedAdamW(ours, memory, **OPTIONS), oracle])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_where_everything_fits_nothing_moves():
    memory = PagedMemory(1 << 20, 256)
    params = parameters()
    train([params], [PagedAdamW(params, memory, **OPTIONS)], num_steps=20)
    assert memory.counts.faults == memory.counts.evictions == 0 and not memory.on_host


def test_a_peak_of_activations_pushes_out_only_what_it_needs():
    memory = PagedMemory(800, 100)
    pages = [memory.allocate(torch.zeros(25)) for _ in range(8)]
    memory.touch(pages[0])  # now page 1 is the least recently used
    with memory.reserve(250):
        assert list(memory.on_host) == [1, 2, 3] and memory.used_bytes == 750
    assert memory.counts.evictions == 3 and memory.counts.bytes_out == 300
    memory.touch(pages[0])
    assert memory.counts.faults == 0
    memory.touch(pages[2])
    assert memory.counts.faults == 1 and memory.counts.bytes_in == 100
    assert memory.peak_bytes <= 800


@given(st.integers(1, 6), st.integers(1, 10), st.lists(st.integers(0, 9), max_size=60))
@settings(deadline=None, max_examples=60)
def test_faults_match_a_least_recently_used_cache(capacity, num_pages, touches):
    memory = PagedMemory(capacity * 64, 64)
    pages = [memory.allocate(torch.full((16,), float(i))) for i in range(num_pages)]
    cache, faults = OrderedDict.fromkeys(range(min(capacity, num_pages))), 0
    for touch in (t % num_pages for t in touches):
        if touch not in cache:
            faults += 1
            if len(cache) == capacity:
                cache.popitem(last=False)
        cache[touch] = None
        cache.move_to_end(touch)
        assert torch.equal(memory.touch(pages[touch]), torch.full((16,), float(touch)))
    assert memory.counts.faults == faults and list(memory.on_device) == list(cache)


def test_writes_survive_thrashing():
    memory = PagedMemory(64, 64)
    pages = [memory.allocate(torch.zeros(16)) for _ in range(5)]
    for _ in range(7):
        for page in pages:
            memory.touch(page).add_(page + 1)
    assert [memory.peek(p)[0].item() for p in pages] == [7.0, 14.0, 21.0, 28.0, 35.0]
    assert memory.counts.faults == 7 * 5 - 1  # all but the very first touch


def test_state_moves_between_paged_and_plain():
    first, second, third = parameters(), parameters(), parameters()
    plain = AdamW(first, **OPTIONS)
    train([first], [plain], num_steps=3)
    for copy in (second, third):
        for a, b in zip(copy, first, strict=True):
            a.data.copy_(b)
    paged = PagedAdamW(second, PagedMemory(128, 64), **OPTIONS)
    paged.load_state_dict(plain.state_dict())
    back = AdamW(third, **OPTIONS)
    back.load_state_dict(paged.state_dict())
    train([first, second, third], [plain, paged, back], num_steps=3, seed=4)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    optimizer = PagedAdamW(params, PagedMemory(64, 64), **OPTIONS)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(params[1:], before[1:], strict=True))


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="at least one page of 4096 bytes, got 4095"):
        PagedMemory(4095, 4096)
    with pytest.raises(ValueError, match="page_bytes: expected at least 16"):
        PagedMemory(100, 8)
    memory = PagedMemory(128, 64)
    with pytest.raises(ValueError, match="page: expected at most 64 bytes, got 68"):
        memory.allocate(torch.zeros(17))
    with pytest.raises(KeyError):
        memory.touch(3)
    with pytest.raises(ValueError, match="num_bytes: expected at least 0, got -1"):
        with memory.reserve(-1):
            pass
    with pytest.raises(OutOfDeviceMemory, match="129 bytes asked for, 128 left of 128"):
        with memory.reserve(129):
            pass
    strided = nn.Parameter(torch.zeros(4, 3).mT)
    strided.grad = torch.ones_like(strided)
    with pytest.raises(ValueError, match="parameter: expected it contiguous"):
        PagedAdamW([strided], memory).step()


def test_a_page_that_reservations_leave_no_room_for_is_refused_and_kept():
    memory = PagedMemory(128, 64)
    pages = [memory.allocate(torch.full((16,), float(i))) for i in range(3)]
    with memory.reserve(100), pytest.raises(OutOfDeviceMemory, match="64 bytes asked for"):
        memory.touch(pages[0])
    assert [memory.touch(p)[0].item() for p in pages] == [0.0, 1.0, 2.0]
