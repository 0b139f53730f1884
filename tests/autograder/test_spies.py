"""The allocation spy counts fresh storage and nothing else."""

import torch

from autograder.spies import largest_new_tensor


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


def test_sees_backward():
    x = torch.randn(4, 4, requires_grad=True)
    y = (x @ x).sum()
    with largest_new_tensor() as spy:
        y.backward()
    assert spy.bytes >= 4 * 4 * 4
