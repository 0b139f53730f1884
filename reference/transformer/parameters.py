"""Where the parameters are: closed forms for Llama and for the models before it.

A block of Llama has two matrices of D x Hd (queries, output), two of D x Kd (keys, values) and
three of D x F; there are no biases, and a norm is one vector:

    N = V D (twice if untied) + L (2 D H d + 2 D K d + 3 D F + 2 D) + D

GPT, BERT and the transformer of 2017 have F = 4D, biases, and norms of two vectors, so that a block
comes to 12 D^2 + 13 D. Every count is a whole number and none builds a model.

Letters: V vocabulary, D model width, L layers, F hidden width, H query heads, K key/value heads,
d head width.
Papers: 1706.03762, table 3; BERT, 1810.04805, sec. 3; GPT-3, 2005.14165, table D.1; Llama,
2302.13971; Llama 2, 2307.09288; Mixtral, 2401.04088, table 1.
"""

from typing import NamedTuple

from reference.activations import feed_forward_parameters
from reference.transformer.config import LlamaConfig


class LlamaParameters(NamedTuple):
    """Parameters of a Llama, by what they do."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def in_matrix_products(self) -> int:
        """Those that a token is multiplied by: an embedding is looked up, a norm is a vector."""
        return self.attention + self.feed_forward + self.head


def llama_parameters(config: LlamaConfig) -> LlamaParameters:
    """Parameters of a Llama by part. `head` is zero where the embedding serves as head as well.

    Raises: nothing that the configuration has not raised.
    Source: Llama 2, arXiv 2307.09288, sec. 2.2 and table 1, counted.
    """
    dim, width = config.dim, config.head_dim
    attention = 2 * dim * width * (config.num_heads + config.num_kv_heads)
    feed_forward = feed_forward_parameters(dim, config.hidden_dim, is_gated=True)
    embedding = config.vocab_size * dim
    return LlamaParameters(
        embedding=embedding,
        attention=config.num_layers * attention,
        feed_forward=config.num_layers * feed_forward,
        norms=config.num_layers * 2 * dim + dim,
        head=0 if config.is_tied else embedding,
    )


def gpt_parameters(*, dim: int, num_layers: int, vocab_size: int = 50257, context: int) -> int:
    """Parameters of GPT-2 and GPT-3: learned positions, biases, a last norm, a tied head.

    GPT-2 small is 124,439,808 ("117M" in its report), GPT-3 174,604,259,328 ("174,600M").

    Source: arXiv 2005.14165, table D.1 (the total of GPT-3 175B).
    """
    return (vocab_size + context) * dim + num_layers * _block_of_2017(dim, 4 * dim) + 2 * dim


def bert_parameters(
    *, dim: int, num_layers: int, vocab_size: int = 30522, context: int = 512
) -> int:
    """Parameters of BERT's encoder: tokens, positions, two segments, a norm, blocks, the pooler.

    Source: arXiv 1810.04805, sec. 3 (110M and 340M).
    """
    embeddings = (vocab_size + context + 2) * dim + 2 * dim
    pooler = dim * dim + dim
    return embeddings + num_layers * _block_of_2017(dim, 4 * dim) + pooler


def encoder_decoder_parameters(
    *, dim: int, hidden_dim: int, num_layers: int, vocab_size: int, attention_bias: bool = True
) -> int:
    """Parameters of the transformer of 2017: N layers a side, one embedding for both and the head.

    The paper prints 65M and 213M for a vocabulary of "about 37000", where this gives 63.1M and
    214.2M: the base model needs one of about 41,000. `attention_bias=False` is the paper's own
    equation, without biases around attention.

    Source: arXiv 1706.03762, table 3.
    """
    encoder = _block_of_2017(dim, hidden_dim)
    decoder = encoder + 4 * dim * dim + 4 * dim + 2 * dim  # cross-attention and its norm
    attention_biases = 0 if attention_bias else 3 * num_layers * 4 * dim
    return vocab_size * dim + num_layers * (encoder + decoder) - attention_biases


class MixtureParameters(NamedTuple):
    """All parameters, and those that one token passes through."""

    total: int
    active: int


def mixtral_parameters(
    config: LlamaConfig, *, num_experts: int, experts_per_token: int
) -> MixtureParameters:
    """Parameters of a Llama whose feed-forward layer is a choice among experts, plus the router's.

    Source: Mixtral, arXiv 2401.04088, table 1: 8 experts, 2 a token.
    """
    parts = llama_parameters(config)
    router = config.num_layers * config.dim * num_experts
    shared = parts.total - parts.feed_forward + router
    return MixtureParameters(
        shared + num_experts * parts.feed_forward, shared + experts_per_token * parts.feed_forward
    )


def _block_of_2017(dim: int, hidden_dim: int) -> int:
    """Four projections, two matrices, their biases and two LayerNorms."""
    feed_forward = feed_forward_parameters(dim, hidden_dim, is_gated=False) + hidden_dim + dim
    return 4 * dim * dim + 4 * dim + feed_forward + 4 * dim
