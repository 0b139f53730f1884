"""How much arithmetic a token costs, and what share of the machine's arithmetic that is.

A matrix of n weights costs a token 2n FLOPs (a product and a sum each), forward. Backward costs
twice as much: one product for the gradient of the input, one for that of the weight. So training
takes 6 FLOPs a weight and token, and 6ND for N weights and D tokens. What the rule leaves out is
attention between tokens (4 H d S a layer, forward); what it should leave out is the embedding,
which is looked up.

    forward   = 2 (attention + feed-forward + head weights) + 4 L H d S     for a token and S keys
    training  = 3 forward
    MFU       = tokens a second * FLOPs a token / peak FLOPs a second

Letters: L layers, H query heads, d head width, S keys, N parameters.
Papers: 6N, 2001.08361, sec. 2.1; MFU, PaLM, 2204.02311, sec. 4.1 and appendix B.
"""

from reference.activations import feed_forward_flops
from reference.attention import attention_flops, projection_flops
from reference.transformer.config import LlamaConfig
from reference.transformer.parameters import llama_parameters

# One forward pass, and two as much for backward.
TRAINING_PASSES = 3


def forward_flops(
    config: LlamaConfig,
    seq_len: int,
    *,
    num_keys: int | None = None,
    num_logits: int | None = None,
    is_causal: bool = False,
) -> int:
    """FLOPs of the matrix products of one forward pass over one sequence.

    `num_keys` is `seq_len` and what a cache holds besides. `num_logits` is for how many tokens the
    head is computed, all by default. `is_causal` counts only the pairs that the mask leaves: what a
    kernel that skips the others does; without it all pairs count, as an eager kernel computes them.
    Norms, rotations and softmax are not products of matrices: under 1 % at any published size.

    Raises: ValueError for a length below 1, or fewer keys than queries.
    Source: arXiv 2001.08361, table 1, with all of Llama's matrices.
    """
    num_keys = seq_len if num_keys is None else num_keys
    if seq_len < 1 or num_keys < seq_len:
        raise ValueError(
            f"seq_len, num_keys: expected 1 <= seq_len <= num_keys, got {seq_len} and {num_keys}; "
            "keys are the tokens in a cache and the new ones"
        )
    heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    a_layer = (
        projection_flops(
            dim=config.dim, num_kv_heads=config.num_kv_heads, num_tokens=seq_len, **heads
        )
        + attention_flops(num_queries=seq_len, num_keys=num_keys, is_causal=is_causal, **heads)
        + feed_forward_flops(config.dim, config.hidden_dim, is_gated=True, num_tokens=seq_len)
    )
    head = 2 * (seq_len if num_logits is None else num_logits) * config.dim * config.vocab_size
    return config.num_layers * a_layer + head


def training_flops_per_token(
    config: LlamaConfig, seq_len: int, *, is_causal: bool = False
) -> float:
    """FLOPs that training spends on a token of a sequence: three forward passes' worth.

    Raises: ValueError for a length below 1.
    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    return TRAINING_PASSES * forward_flops(config, seq_len, is_causal=is_causal) / seq_len


def six_n(config: LlamaConfig) -> int:
    """6N: training FLOPs a token by the rule of thumb, all parameters counted.

    Source: arXiv 2001.08361, sec. 2.1.
    """
    return 6 * llama_parameters(config).total


def model_flops_utilization(
    *, tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float
) -> float:
    """MFU: the share of the peak that the model's own arithmetic makes use of.

    Work done twice (recomputed activations) does not count, so that a scheme cannot look better by
    doing more. The peak is that of all devices together, in the precision of the products.

    Raises: ValueError for a negative rate or a peak that is not positive.
    Source: PaLM, arXiv 2204.02311, sec. 4.1.
    """
    if tokens_per_second < 0 or flops_per_token < 0:
        raise ValueError(
            "tokens_per_second, flops_per_token: expected at least 0, "
            f"got {tokens_per_second} and {flops_per_token}"
        )
    if peak_flops_per_second <= 0:
        raise ValueError(
            f"peak_flops_per_second: expected more than 0, got {peak_flops_per_second}; "
            "an A100 does 312e12 in bfloat16"
        )
    return tokens_per_second * flops_per_token / peak_flops_per_second
