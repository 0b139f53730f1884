"""Autocast: choose the precision operation by operation, while the weights stay float32.

    lower     products of matrices: many terms, accumulated in float32 by the hardware, large gains
    float32   exponentials, logarithms, norms, long sums, losses: range or rounding would hurt
    widest    operations on several tensors: the widest dtype among them
    others    run in whatever dtype comes in

Casts are ordinary operations of autograd, so gradients come back in the weights' own float32.
This is the idea in Python, above torch's functions; torch's own sits in the C++ dispatcher.

Source: the operation lists in PyTorch's documentation of torch.amp; names as in torch and
torch.nn.functional.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Policy:
    """Names of the functions that run in the lower dtype, in float32, or in the widest of inputs.

    Raises: ValueError for a name in two lists.
    """

    lower: frozenset[str]
    float32: frozenset[str]
    widest: frozenset[str]

    def __post_init__(self) -> None:
        twice = self.lower & self.float32 | self.lower & self.widest | self.float32 & self.widest
        if twice:
            raise ValueError(f"policy: expected each name in one list, got twice {sorted(twice)}")

    def dtype_for(self, name: str, inputs: Sequence[Tensor], lower: torch.dtype) -> Any:
        """The dtype that a function's floating inputs are cast to; None leaves them alone."""
        if name in self.lower:
            return lower
        if name in self.float32:
            return torch.float32
        if name in self.widest and any(x.dtype == torch.float32 for x in inputs):
            return torch.float32
        return None


def names(text: str) -> frozenset[str]:
    """The words of a list of operations."""
    return frozenset(text.split())


MATMULS = names(
    """matmul rmatmul mm bmm linear addmm baddbmm addbmm conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d conv_transpose3d prelu scaled_dot_product_attention"""
)
LOSSES = names(
    """poisson_nll_loss cosine_embedding_loss hinge_embedding_loss margin_ranking_loss
    triplet_margin_loss binary_cross_entropy_with_logits nll_loss l1_loss smooth_l1_loss mse_loss
    multilabel_margin_loss soft_margin_loss multi_margin_loss"""
)
CUDA = Policy(
    lower=MATMULS | names("addmv addr einsum mv chain_matmul lstm_cell gru_cell"),
    float32=LOSSES
    | names(
        """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow
        softmax log_softmax softmin layer_norm rms_norm group_norm norm cosine_similarity kl_div
        cross_entropy gaussian_nll_loss cumprod cumsum dist pdist cdist prod renorm sum logsumexp
        softplus"""
    ),
    widest=names(
        """addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot
        scatter_add cat stack"""
    ),
)
CPU = Policy(
    lower=MATMULS,
    float32=LOSSES | names("avg_pool3d binary_cross_entropy huber_loss reflection_pad1d"),
    widest=names("cat stack"),
)


class Autocast(TorchFunctionMode):
    """Within `with Autocast(torch.bfloat16):` every torch function follows the policy.

    Only float32, float16 and bfloat16 inputs are cast; float64 and integers never, and nothing
    where the result goes to a given tensor (x.exp_(), out=). A weight (a leaf that requires a
    gradient) is cast once and kept until the block ends.

    Raises: ValueError for a dtype other than float16 and bfloat16.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, policy: Policy = CUDA) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
        super().__init__()
        self.dtype = dtype
        self.policy = policy
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        leaves, structure = tree_flatten((args, options))
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        name = getattr(func, "__name__", "").removeprefix("__").removesuffix("__")
        has_out = options.get("out") is not None
        dtype = None if has_out else self.policy.dtype_for(name, inputs, self.dtype)
        if dtype is None:
            return func(*args, **options)
        leaves = [self._cast(x, dtype) if isinstance(x, Tensor) else x for x in leaves]
        args, options = tree_unflatten(leaves, structure)
        return func(*args, **options)

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return x
        if dtype == torch.float32 or not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._weights:  # the weight is kept too, so that its id stays its own
            self._weights[id(x)] = (x, x.to(dtype))
        return self._weights[id(x)][1]

    def __exit__(self, *exc: Any) -> None:
        self._weights.clear()
        super().__exit__(*exc)
