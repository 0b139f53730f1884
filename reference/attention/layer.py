"""The attention layer: project to heads, attend, project back.

    q, k, v = x W_Q, x W_K, x W_V        y = merge(attend(q, k, v, mask)) W_O

What changes from model to model is passed in: `rotate` brings positions, `cache` earlier keys and
values, `attend` the kernel. So this file knows neither of them, and all of them know this file.

Shapes: B batch, T queries, S keys, D model width, H query heads, K key/value heads, d head width.
Papers: arXiv 1706.03762, sec. 3.2.2; MQA, 1911.02150; GQA, 2305.13245.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from reference.attention.dot_product import Mask, scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, Mask | None], Tensor]


@runtime_checkable
class KVCache(Protocol):
    """Keeps keys and values of each layer; transformers' DynamicCache is one."""

    def update(self, k: Tensor, v: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, d) tensors to a layer's and return all S of them."""
        ...


def split_heads(x: Float[Tensor, "B T HD"], num_heads: int) -> Float[Tensor, "B H T d"]:
    """Cut the width into heads and bring them before the positions; no copy is made.

    Raises: ValueError where the width is no multiple of num_heads.
    """
    batch, seq_len, width = x.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"x: expected a width that {num_heads} heads divide, got {width}")
    return x.view(batch, seq_len, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T d"]) -> Float[Tensor, "B T HD"]:
    """Bring positions before heads again, then join the heads: the inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head, grouped-query (K < H) or multi-query (K = 1) attention, self or cross.

    The parameters are named as in Llama checkpoints. `layer` is the index under which a cache
    keeps this layer's keys. `head_dim` is free: H * d need not equal D.

    Raises: ValueError for head counts or widths that do not fit.
    Source: arXiv 1706.03762, sec. 3.2.2; arXiv 2305.13245, sec. 2.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        layer: int = 0,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads={num_heads}, got {dim}")
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.layer = layer
        self._build_projections(dim, bias)

    def _build_projections(self, dim: int, bias: bool) -> None:
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, q_width, bias=bias)
        self.k_proj = nn.Linear(dim, kv_width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, dim, bias=bias)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from `x`, keys and values from `context`, as flat widths."""
        return self.q_proj(x), self.k_proj(context), self.v_proj(context)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Mask | None = None,
        *,
        context: Float[Tensor, "B S D"] | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache: KVCache | None = None,
        attend: Attend = scaled_dot_product_attention,
    ) -> Float[Tensor, "B T D"]:
        """Attend from `x` to itself, or to `context` (cross-attention).

        `rotate` maps q and k, (B, heads, T, d), to themselves at their positions before k is
        cached. `attend` receives k and v with K heads; dropout is its business too:
        `attend=partial(scaled_dot_product_attention, dropout_rate=0.1)` while training. No mask is
        implied: pass `causal_mask(T, S)` for a decoder.

        Raises: ValueError for a `context` together with `cache` or `rotate`, whose positions are
        those of `x`.
        """
        if context is not None and (cache is not None or rotate is not None):
            raise ValueError("context: expected no cache and no rotate beside it; they belong to x")
        q, k, v = self.project(x, x if context is None else context)
        q = split_heads(q, self.num_heads)  # (B, H, T, d)
        k, v = split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, d)
        return self.o_proj(merge_heads(attend(q, k, v, mask)))


class FusedAttention(Attention):
    """`Attention` with W_Q, W_K, W_V as one matrix: one product, one read of x.

    The rows are all of q, then all of k, then all of v, as in nn.MultiheadAttention's
    in_proj_weight; other checkpoints interleave them head by head.
    """

    def _build_projections(self, dim: int, bias: bool) -> None:
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=bias)
        self.o_proj = nn.Linear(q_width, dim, bias=bias)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if context is x:
            q, k, v = self.qkv_proj(x).split(self.widths, -1)
            return q, k, v
        weight = self.qkv_proj.weight.split(self.widths)
        bias = [None] * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.split(self.widths)
        q, k, v = (
            nn.functional.linear(source, w, b)
            for source, w, b in zip((x, context, context), weight, bias, strict=True)
        )
        return q, k, v
