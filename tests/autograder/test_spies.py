"""The allocation spy counts fresh storage and nothing else."""

import torch

from autograder.spies import largest_new_tensor, order_of_reads


def test_sees_the_largest_fresh_storage():
    x = torch.randn(8, 16)
    with largest_new_tensor() as spy:
        x @ x.T
    assert spy.bytes == 8 * 8 * 4 and spy.shape == (8, 8)


def test_views_and_in_place_operations_cost_nothing():
    x = torch.randn(8, 16)
    with largest_new_tensor() as spy:
        x.mul_(2)
        x.view(16, 8).T[:3].unsqueeze(0).expand(5, 3, 16)
    assert spy.bytes == 0 and spy.total_bytes == 0


def test_sees_what_grows_in_place():
    x = torch.randn(8, 16)
    with largest_new_tensor() as spy:
        buffer = x.new_empty(0)
        buffer.resize_(8, 8)
        torch.matmul(x, x.T, out=buffer)
    assert spy.bytes == 8 * 8 * 4


def test_sees_backward():
    x = torch.randn(4, 4, requires_grad=True)
    y = (x @ x).sum()
    with largest_new_tensor() as spy:
        y.backward()
    assert spy.bytes >= 4 * 4 * 4


def test_order_of_reads_shows_who_comes_back():
    blocks = [torch.randn(4, 2) for _ in range(3)]
    with order_of_reads(blocks) as spy:
        first = blocks[0][0]
        for block in blocks:
            (block - first).square().sum()
    assert spy.order == [0, 1, 2]
    with order_of_reads(blocks) as spy:
        mean = sum(block.sum(0) for block in blocks) / 12
        sum((block - mean).square().sum() for block in blocks)
    assert spy.order == [0, 1, 2, 0, 1, 2]
