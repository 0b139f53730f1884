"""What context parallelism sends, and when it can hide: closed forms.

One layer's attention on one of N ranks, forward, in numbers (not bytes); T positions in all, B
rows, D = H d the width of queries, E = K d that of keys, E <= D:

    Ulysses       B (T/N) (2 D + 2 max(E, N d)) (N-1)/N      falls as 1/N
    ring          B (T/N) 2 E (N-1)                          does not fall
    gathered      B (T/N) 2 E (N-1)

and backward as much for Ulysses; for the ring once more plus B (T/N) 2 E N of gradients, for
gathered keys once more plus the same again for a reduce-scatter of gradients.

A step of the ring hides behind computing where 4 c^2 D / F >= 4 c E / bandwidth, with c positions
on a rank, 16-bit keys, F FLOPs a second: c >= F E / (bandwidth D). Neither N nor T is in it.

Papers: Ulysses, 2309.14509, sec. 3.2; Ring Attention, 2310.01889, sec. 3 and table 2.
"""

from __future__ import annotations

from typing import Literal

from reference.parallel.options import above_zero, at_least, one_of
from reference.parallel.ranks import Hardware

Method = Literal["ulysses", "ring", "gathered"]


def attention_bytes(
    method: Method,
    *,
    batch: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_ranks: int,
    element_bytes: int = 2,
    gradient_bytes: int | None = None,
    is_backward: bool = False,
) -> float:
    """Bytes that a rank sends for one layer's attention, one way; see the table of this module.

    `gradient_bytes` is the size of a number of keys' gradients on their way (ours are wide: 4).

    Raises: ValueError for an unknown method, counts below 1, more Ulysses ranks than query heads,
    or gradients of another size for Ulysses.
    """
    one_of("method", method, Method)
    at_least(1, [("batch", batch), ("seq_len", seq_len), ("num_heads", num_heads),
                 ("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("num_ranks", num_ranks),
                 ("element_bytes", element_bytes)])  # fmt: skip
    if method == "ulysses" and gradient_bytes not in (None, element_bytes):
        raise ValueError(
            f"gradient_bytes: expected {element_bytes}, as element_bytes, got {gradient_bytes}; "
            "Ulysses sends gradients in the dtype of values"
        )
    n, part = num_ranks, batch * seq_len / num_ranks
    width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    wide = element_bytes if gradient_bytes is None else gradient_bytes
    if method == "ulysses":
        if n > num_heads:
            raise ValueError(
                f"num_ranks: expected at most {num_heads}, the number of query heads, got {n}"
            )
        numbers = 2 * width + 2 * max(kv_width, n * head_dim)
        return part * numbers * (n - 1) / n * element_bytes
    keys = part * 2 * kv_width * (n - 1) * element_bytes
    if not is_backward:
        return keys
    hops = 0 if n == 1 else n if method == "ring" else n - 1
    return keys + part * 2 * kv_width * hops * wide


def least_part(
    flops_per_second: float,
    bytes_per_second: float,
    *,
    group_size: int = 1,
    is_causal: bool = False,
) -> float:
    """Positions a rank needs for a ring's messages to hide behind its products.

    F / bandwidth, of the paper; G query heads for each key/value head do G times the products for
    the same message, a balanced causal mask half of them.

    Raises: ValueError for rates that are not above 0 or groups below 1.
    Source: arXiv 2310.01889, sec. 3.
    """
    above_zero([("flops_per_second", flops_per_second), ("bytes_per_second", bytes_per_second)])
    at_least(1, [("group_size", group_size)])
    return flops_per_second / bytes_per_second / group_size * (2 if is_causal else 1)


def ring_forward_seconds(
    hardware: Hardware,
    *,
    batch: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_ranks: int,
    element_bytes: int = 2,
) -> float:
    """Of one layer without a mask: N products, between them N - 1 times the longer of both.

    Raises: ValueError for counts below 1.
    """
    at_least(1, [("batch", batch), ("seq_len", seq_len), ("num_heads", num_heads),
                 ("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("num_ranks", num_ranks),
                 ("element_bytes", element_bytes)])  # fmt: skip
    part = seq_len / num_ranks
    compute = 4 * batch * part**2 * num_heads * head_dim / hardware.flops_per_second
    link = hardware.intra if num_ranks <= hardware.ranks_per_node else hardware.inter
    sent = 2 * batch * part * num_kv_heads * head_dim * element_bytes
    message = link.latency_seconds + sent / link.bytes_per_second
    return compute + (num_ranks - 1) * max(compute, message)
