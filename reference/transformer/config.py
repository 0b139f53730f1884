"""What makes one Llama differ from another: a dozen numbers, and those of all published sizes.

Between Llama 1 and Llama 3.2 the block stayed what it was. What changed: grouped key/value heads
(the 70B of Llama 2, everything from Llama 3 on), the vocabulary (32,000 to 128,256), the RoPE base
(10,000 to 500,000), the context (2,048 to 131,072), a tied embedding in the smallest.

Letters: V vocab_size, D dim, L num_layers, H num_heads, K num_kv_heads, d head_dim, F hidden_dim.
Papers: Llama, 2302.13971, table 2; Llama 2, 2307.09288, table 1 and appendix A.2.1; Llama 3,
2407.21783, table 3; SmolLM2, 2502.02737. Norm and RoPE base: the models' published config.json.
"""

from dataclasses import dataclass

from reference.positions import RopeScaling


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model. `max_seq_len` is its context in tokens, keys in a cache included.

    `is_tied`: the embedding's matrix is the head's as well. `initializer_std` is that of all
    matrices of a fresh model. `num_kv_heads` and `head_dim` are num_heads and dim // num_heads by
    default. Make a variant by `dataclasses.replace(config, num_layers=2)`.

    Raises: ValueError for sizes that do not fit each other.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    is_tied: bool = False
    initializer_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for name in ("vocab_size", "dim", "hidden_dim", "num_layers", "num_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if not self.head_dim:
            if self.dim % self.num_heads:
                raise ValueError(
                    f"dim: expected a multiple of num_heads={self.num_heads}, got {self.dim}; "
                    "or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number, got {self.head_dim}; RoPE turns pairs"
            )
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
