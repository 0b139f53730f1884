"""The oracles: torch.autocast on the CPU, and the lists that PyTorch's own tests go by."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.autocast_test_lists import AutocastCPUTestLists, AutocastTestLists

from reference.mixed_precision import CPU, CUDA, Autocast, Policy

# Ways in below the functions that people call, which a mode above them does not see by that name.
BELOW = {
    "_convolution",
    "convolution",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "nll_loss2d",
    "grid_sampler",
    "_addmm_activation",
    "_native_multi_head_attention",
}


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("torch_fp16", "lower"),
        ("nn_fp16", "lower"),
        ("torch_fp32", "float32"),
        ("nn_fp32", "float32"),
        ("torch_need_autocast_promote", "widest"),
    ],
)
def test_matches_the_cuda_lists_of_pytorch(theirs, ours):
    listed = {entry[0] for entry in getattr(AutocastTestLists("cpu"), theirs)} - BELOW
    assert listed <= getattr(CUDA, ours)


def cpu_calls():
    lists = AutocastCPUTestLists("cpu")
    sources = {
        "torch_16": torch,
        "torch_fp32": torch,
        "nn_16": torch._C._nn,
        "nn_fp32": torch._C._nn,
        "torch_need_autocast_promote": torch,
        "torch_expect_builtin_promote": torch,
    }
    for name, module in sources.items():
        for entry in getattr(lists, name):
            if entry[0] not in BELOW and hasattr(module, entry[0]):
                options = next((extra for extra in entry[2:] if isinstance(extra, dict)), {})
                call = (getattr(module, entry[0]), entry[1], options)
                yield pytest.param(*call, id=f"{name}-{entry[0]}")


@pytest.mark.parametrize("function, args, options", list(cpu_calls()))
def test_matches_autocast_on_the_cpu(function, args, options):
    with torch.autocast("cpu", torch.bfloat16):
        theirs = function(*args, **options)
    with Autocast(torch.bfloat16, policy=CPU):
        ours = function(*args, **options)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


class Block(nn.Module):
    """Norm, attention and an MLP, with tied use of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        x = x + (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)
        return x + self.down(F.silu(self.up(self.norm(x))))


def test_matches_gradients_of_autocast():
    torch.manual_seed(0)
    ours, x = Block(), torch.randn(2, 5, 16)
    theirs = copy.deepcopy(ours)
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(x)
    with Autocast(torch.bfloat16, policy=CPU):
        got = ours(x)
    assert torch.equal(got, expected)
    got.float().square().mean().backward()
    expected.float().square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad, b.grad)


def test_the_cuda_policy_keeps_softmax_and_norms_wide():
    x = torch.randn(3, 4)
    with Autocast(torch.bfloat16, policy=CUDA):
        product = x @ x.T
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert F.layer_norm(product.float(), (3,)).dtype == torch.float32
        assert (product**2).dtype == torch.float32
        assert F.cross_entropy(product, torch.tensor([0, 1, 2])).dtype == torch.float32
        assert torch.cat([product, x[:, :3]]).dtype == torch.float32
        assert F.relu(product).dtype == torch.bfloat16


def test_float64_integers_and_given_results_are_left_alone():
    wide = torch.randn(2, 2, dtype=torch.float64)
    counts = torch.arange(4).view(2, 2)
    out = torch.empty(2, 2)
    with Autocast(torch.bfloat16):
        assert (wide @ wide).dtype == torch.float64
        assert (counts @ counts).dtype == torch.int64
        half = torch.zeros(2, dtype=torch.bfloat16)
        assert half.exp_() is half and half.tolist() == [1.0, 1.0]
        torch.matmul(wide.float(), wide.float(), out=out)
    assert torch.equal(out, wide.float() @ wide.float())


def test_weights_are_cast_once_a_block():
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(2, 4)
    with Autocast(torch.bfloat16) as mode:
        F.linear(x, weight)
        F.linear(x, weight)
        assert len(mode._weights) == 1
    assert not mode._weights
    with torch.no_grad():
        weight.mul_(2)
    with Autocast(torch.bfloat16):
        assert torch.equal(F.linear(x, weight), F.linear(x.bfloat16(), weight.bfloat16()))


def test_rejects_other_dtypes_and_names_in_two_lists():
    with pytest.raises(ValueError, match="got torch.float32"):
        Autocast(torch.float32)
    with pytest.raises(ValueError, match="got twice"):
        Policy(frozenset({"exp"}), frozenset({"exp"}), frozenset())
