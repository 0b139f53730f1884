"""What attention costs: bytes kept, FLOPs done, elements read.

Keys and values of all earlier tokens are kept while a model generates: 2 tensors a layer, K heads
of width d, one row a token. Generating one token reads all of them for a few FLOPs each, so that
memory traffic and not arithmetic sets the pace, and every key/value head less is time gained.

Shapes: B batch, T queries, S keys, D model width, H query heads, K key/value heads, d head width.
Papers: MQA, arXiv 1911.02150, sec. 2.4 and 3; GQA, arXiv 2305.13245.
"""


def kv_cache_bytes(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_tokens: int = 1,
    bits: int = 16,
) -> int:
    """Bytes of keys and values: 2 L K d elements a token. `num_tokens` counts the whole batch.

    Raises: ValueError for a negative count.
    """
    counts = {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_tokens": num_tokens,
    }
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}: expected at least 0, got {count}")
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * bits // 8


def attention_flops(
    *, num_heads: int, head_dim: int, num_queries: int, num_keys: int, is_causal: bool = False
) -> int:
    """FLOPs of q k^T and P v for one sequence and layer: 4 H d a pair; a product-sum counts as 2.

    With `is_causal` only the pairs that the bottom-right aligned mask leaves are counted: what a
    kernel that skips masked blocks can save at most.
    """
    pairs = num_queries * num_keys
    if is_causal:
        offset = num_keys - num_queries
        pairs = sum(min(num_keys, max(0, offset + t + 1)) for t in range(num_queries))
    return 4 * num_heads * head_dim * pairs


def projection_flops(
    *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int
) -> int:
    """FLOPs of W_Q, W_K, W_V and W_O for one layer: 2 a weight and token."""
    return 2 * num_tokens * dim * head_dim * (2 * num_heads + 2 * num_kv_heads)


def decode_intensity(*, num_heads: int, num_kv_heads: int, bits: int = 16) -> float:
    """FLOPs a byte of cache read when one token is generated: H / K for 16-bit elements.

    4 H d S FLOPs over 2 K d S elements; length and width cancel, and the batch as well, since each
    sequence has a cache of its own.
    """
    return 2 * num_heads / num_kv_heads / (bits / 8)


def decode_reads(
    *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, batch_size: int, num_keys: int
) -> int:
    """Elements that one layer reads to attend from one new token in each sequence of a batch.

    The four weights once for the batch, keys and values for each sequence, the input row.
    """
    weights = dim * head_dim * (2 * num_heads + 2 * num_kv_heads)
    cache = 2 * batch_size * num_kv_heads * head_dim * num_keys
    return weights + cache + batch_size * dim
