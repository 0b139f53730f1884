"""Who may look at whom: boolean masks, True where a query sees a key.

Each builder states one condition, and conditions combine with `&` and `|`. The queries are the
last T of S positions unless `offset` says otherwise: with a cache of S - T earlier keys, query t
stands at position S - T + t (bottom-right alignment). torch's `is_causal=True` puts query t at
position t (top-left), which agrees only where T = S.

Shapes: B batch, T queries, S keys.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(
    num_queries: int,
    num_keys: int | None = None,
    *,
    offset: int | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "T S"]:
    """A query sees the keys at its own position and before it.

    `offset` is the position of the first query: num_keys - num_queries by default, as a cache
    needs it; 0 gives torch's `is_causal`. With more queries than keys the first rows are empty.

    Raises: ValueError for a negative length.
    Source: Attention is all you need, arXiv 1706.03762, sec. 3.2.3.
    """
    distance = _distance(num_queries, num_keys, offset, device)
    return distance >= 0


def sliding_window_mask(
    num_queries: int,
    num_keys: int | None = None,
    *,
    window: int,
    offset: int | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "T S"]:
    """A query sees the last `window` positions, its own among them. It implies `causal_mask`.

    Raises: ValueError for a negative length or a window below 1.
    Source: Longformer, arXiv 2004.05150, sec. 3.1; Mistral 7B, arXiv 2310.06825, sec. 2.
    """
    if window < 1:
        raise ValueError(
            f"window: expected at least 1, got {window}; a query counts itself, so that a window "
            "of 1 sees only its own position"
        )
    distance = _distance(num_queries, num_keys, offset, device)
    return (distance >= 0) & (distance < window)


def padding_mask(
    lengths: Int[Tensor, " B"], num_keys: int, *, side: str = "right"
) -> Bool[Tensor, "B 1 1 S"]:
    """Every query of sequence b sees its `lengths[b]` real keys and no padding.

    `side` is where the padding is: 'right' for training, 'left' for batched generation, so that
    all sequences end at the same index. Padded queries still see the real keys: their outputs mean
    nothing and the loss must leave them out.

    Raises: ValueError for an unknown side or a length outside 0 ... num_keys.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > num_keys):
        raise ValueError(
            f"lengths: expected values in 0 ... {num_keys}, got {lengths.tolist()}; "
            "num_keys is the padded length"
        )
    index = torch.arange(num_keys, device=lengths.device)
    if side == "left":
        index = num_keys - 1 - index
    return (index < lengths[:, None])[:, None, None, :]


def document_mask(
    documents: Int[Tensor, "B S"], num_queries: int | None = None
) -> Bool[Tensor, "B 1 T S"]:
    """A query sees the keys of its own document, for sequences packed from several.

    `documents` holds each position's document number; the queries are the last `num_queries`.

    Raises: ValueError where there are more queries than positions.
    Source: Llama 3, arXiv 2407.21783, sec. 3.2 (attention mask between documents).
    """
    num_keys = documents.shape[1]
    num_queries = num_keys if num_queries is None else num_queries
    if not 0 <= num_queries <= num_keys:
        raise ValueError(
            f"num_queries: expected 0 ... {num_keys} (a row of documents), got {num_queries}"
        )
    of_queries = documents[:, num_keys - num_queries :]
    return (of_queries[:, :, None] == documents[:, None, :])[:, None]


def additive_mask(mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The same mask as numbers to add to the scores: 0 where True, -inf where False.

    -inf exists in every floating dtype, where a constant such as -1e9 overflows in float16. A row
    of -inf alone is what `masked_softmax` turns into zeros.

    Raises: TypeError for a mask that is not boolean (adding twice would not be seen).
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}; write mask.bool()")
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, -torch.inf)


def _distance(
    num_queries: int,
    num_keys: int | None,
    offset: int | None,
    device: torch.device | str | None,
) -> Int[Tensor, "T S"]:
    """How far back from each query each key lies."""
    num_keys = num_queries if num_keys is None else num_keys
    for name, length in (("num_queries", num_queries), ("num_keys", num_keys)):
        if length < 0:
            raise ValueError(f"{name}: expected a length of at least 0, got {length}")
    first = num_keys - num_queries if offset is None else offset
    queries = torch.arange(first, first + num_queries, device=device)
    return queries[:, None] - torch.arange(num_keys, device=device)[None, :]
