"""Bytes that one GPT layer keeps for backward, on each of N ranks.

In 16 bits with byte masks, s positions, b rows, h width, a heads, t ranks:

    nothing divided              s b h (34 + 5 a s / h)
    tensor parallel              s b h (10 + 24 / t + 5 a s / (h t))
    and sequence parallel        s b h (34 / t + 5 a s / (h t))
    and selective recomputation  s b h 34 / t
    full recomputation           s b h 2             and sequence parallel: s b h 2 / t

Ten of tensor parallelism's bytes are what all ranks hold alike: inputs of two norms and of two
regions, two masks. With sequence parallelism the paper keeps a region's input in parts and gathers
it again in backward; code that does not keeps 4 s b h (1 - 1/t) more. The term with s^2 is
attention's weights, which selective recomputation makes anew.

Source: Korthikanti et al., arXiv 2205.05198, eq. 1 to 6 and table 2.
"""

from __future__ import annotations

from typing import Literal

from reference.parallel.options import at_least, one_of

Recompute = Literal["none", "selective", "full"]


def layer_activation_bytes(
    seq_len: int,
    batch: int,
    dim: int,
    num_heads: int,
    *,
    num_ranks: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> float:
    """Bytes a layer keeps on one rank. See the table of this module.

    Raises: ValueError for counts below 1 or an unknown kind of recomputation.
    """
    counts = {"seq_len": seq_len, "batch": batch, "dim": dim, "num_heads": num_heads,
              "num_ranks": num_ranks}  # fmt: skip
    at_least(1, counts.items())
    one_of("recompute", recompute, Recompute)
    stream = seq_len * batch * dim
    if recompute == "full":
        return 2.0 * stream / (num_ranks if sequence_parallel else 1)
    alike = 10 / num_ranks if sequence_parallel else 10.0
    weights = 0.0 if recompute == "selective" else 5 * num_heads * seq_len / (dim * num_ranks)
    return stream * (alike + 24 / num_ranks + weights)
