"""What the planner needs to know of a model: its widths, and how many parameters lie where.

A GPT has a tied head, biases, dropout and a GELU of 4 D; a Llama a gated hidden layer and, mostly,
a head of its own. Parameters are chapter 05's counts, taken apart by the pipeline stage that holds
them: embedding with the first, final norm and head with the last.
"""

from dataclasses import dataclass

from reference.activations import feed_forward_flops
from reference.attention import projection_flops
from reference.parallel.options import at_least
from reference.transformer import LlamaConfig, gpt_parameters, llama_parameters


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Widths of a decoder, and its parameters by place.

    `head_parameters`: the final norm and, where it is not tied, the head.
    """

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layer_parameters: int
    embedding_parameters: int
    head_parameters: int
    is_tied: bool
    is_gated: bool
    has_dropout: bool

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        layers = self.num_layers * self.layer_parameters
        return layers + self.embedding_parameters + self.head_parameters

    def parameters_of(self, num_layers: int, *, is_first: bool, is_last: bool) -> int:
        """Of a stage. Where the head is tied, a last stage that is not the first has a copy."""
        count = num_layers * self.layer_parameters
        count += self.embedding_parameters if is_first else 0
        if is_last:
            count += self.head_parameters
            count += self.vocab_size * self.dim if self.is_tied and not is_first else 0
        return count

    def layer_flops(self, num_tokens: int) -> int:
        """Of a layer's products with weights, forward."""
        projections = projection_flops(
            dim=self.dim, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, num_tokens=num_tokens,
        )  # fmt: skip
        return projections + feed_forward_flops(
            self.dim, self.hidden_dim, is_gated=self.is_gated, num_tokens=num_tokens
        )

    def head_flops(self, num_tokens: int) -> int:
        """Of the logits, forward."""
        return 2 * num_tokens * self.dim * self.vocab_size

    def pair_flops(self) -> int:
        """Of q k^T and P v, forward, for one query and one key."""
        return 4 * self.num_heads * self.head_dim


def llama_shape(config: LlamaConfig) -> ModelShape:
    """A Llama of chapter 05."""
    parts = llama_parameters(config)
    in_layers = parts.attention + parts.feed_forward + parts.norms - config.dim
    return ModelShape(
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        layer_parameters=in_layers // config.num_layers,
        embedding_parameters=parts.embedding,
        head_parameters=parts.head + config.dim,
        is_tied=config.is_tied,
        is_gated=True,
        has_dropout=False,
    )


def gpt_shape(
    dim: int,
    num_layers: int,
    num_heads: int,
    *,
    vocab_size: int = 51200,
    context: int = 2048,
    has_dropout: bool = True,
) -> ModelShape:
    """A GPT-3 of any size: learned positions, biases, GELU of 4 D, tied head.

    Raises: ValueError for a width that heads do not divide, or counts below 1.
    """
    at_least(1, [("dim", dim), ("num_layers", num_layers), ("num_heads", num_heads),
                 ("vocab_size", vocab_size), ("context", context)])  # fmt: skip
    if dim % num_heads:
        raise ValueError(f"dim: expected a multiple of num_heads={num_heads}, got {dim}")
    ends = {"dim": dim, "vocab_size": vocab_size, "context": context}
    without_layers = gpt_parameters(num_layers=0, **ends)
    return ModelShape(
        dim=dim,
        hidden_dim=4 * dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=dim // num_heads,
        vocab_size=vocab_size,
        layer_parameters=gpt_parameters(num_layers=1, **ends) - without_layers,
        embedding_parameters=without_layers - 2 * dim,
        head_parameters=2 * dim,
        is_tied=True,
        is_gated=False,
        has_dropout=has_dropout,
    )
