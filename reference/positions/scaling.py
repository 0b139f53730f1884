"""Frequencies of RoPE, and ways to stretch them beyond the length that a model was trained on.

A pair turns by theta_i radians a token; its wavelength is 2 pi / theta_i. Positions beyond the
training length bring angles that the slow pairs have never seen.

    linear    every angle / s: positions squeezed into the old range (position interpolation)
    ntk       base * s^(d/(d-2)): the slowest pair is divided by s, the fastest left alone
    dynamic   the same with an s that grows with the text
    yarn      fast pairs left alone, slow ones / s, a ramp between; softmax a little sharper
    llama3    the same idea, cut by wavelength; Llama 3.1

Names of parameters are those of transformers' `rope_parameters`. Frequencies are float32.

Papers: position interpolation, 2306.15595; YaRN (also of the two NTK forms), 2309.00071, sec. 3;
Llama 3.1's rule is in Meta's code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reference.configuration import COUNT, FLAG, NOTHING, NUMBER, TEXT, Keys

NEEDS_TRAINED_LENGTH = ("dynamic", "yarn", "llama3")
TRAINED = {"original_max_position_embeddings": COUNT}
# What each type reads of `rope_parameters`.
READS: dict[str, dict[str, tuple[type, ...]]] = {
    "default": {},
    "linear": {"factor": NUMBER},
    "ntk": {"factor": NUMBER},
    "dynamic": {"factor": NUMBER, **TRAINED},
    "yarn": {
        "factor": NUMBER, **TRAINED, "beta_fast": NUMBER + NOTHING, "beta_slow": NUMBER + NOTHING,
        "attention_factor": NUMBER + NOTHING, "truncate": FLAG,
    },
    "llama3": {
        "factor": NUMBER, **TRAINED, "low_freq_factor": NUMBER, "high_freq_factor": NUMBER,
    },
}  # fmt: skip
ROPE_TYPES = tuple(READS)
# Without them transformers stops; a default of ours would be a guess.
REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's frequencies are stretched.

    `original_max_position_embeddings` is the length that the model was trained on, for the types
    that need it. `low_freq_factor` and `high_freq_factor` (llama3), `beta_slow` and `beta_fast`
    (yarn) are turns within that length: fewer than the first, and a pair is slowed by `factor`;
    more than the second, and it stays. `attention_factor` overrides YaRN's 0.1 ln s + 1; `truncate`
    rounds its ramp outwards to whole pairs.

    Raises: ValueError for a type or a parameter that makes no sense.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}"
            )
        if self.factor < 1:
            raise ValueError(f"factor: expected at least 1, got {self.factor}")
        if self.rope_type in NEEDS_TRAINED_LENGTH and not self.original_max_position_embeddings:
            raise ValueError(
                f"original_max_position_embeddings: {self.rope_type} needs the length of training, "
                f"got {self.original_max_position_embeddings}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low}, {high}: expected 0 < {low} < {high}, "
                    f"got {getattr(self, low)} and {getattr(self, high)}"
                )

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any]) -> "RopeScaling":
        """From `rope_parameters` or the older `rope_scaling` of a Hugging Face config.

        Raises: ValueError for keys that the type does not read, and for missing ones.
        """
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}, got {kind!r}")
        # The default type turns whole heads in transformers' Llama, whatever part is named.
        is_plain = kind == "default"
        keys = Keys(
            file=f"rope_parameters ({kind})",
            honoured={"rope_type": TEXT, "type": TEXT, **READS[kind]},
            plain={} if is_plain else {"partial_rotary_factor": (1.0,)},
            harmless=frozenset({"rope_theta"} | ({"partial_rotary_factor"} if is_plain else set())),
        )
        known = keys.read(parameters)
        if missing := [key for key in REQUIRED if key in READS[kind] and key not in known]:
            raise ValueError(f"rope_parameters ({kind}): expected also {', '.join(missing)}")
        if known.pop("type", kind) != kind:
            raise ValueError(f"rope_type, type: expected one and the same, got {dict(parameters)}")
        return cls(**{**known, "rope_type": kind})


def rope_frequencies(
    head_dim: int,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    *,
    seq_len: int | Tensor | None = None,
) -> Float[Tensor, " half"]:
    """theta_i, i = 0 ... d/2 - 1, in radians a token, stretched as `scaling` says.

    `seq_len`, the length of the text so far, matters to "dynamic" alone; as a tensor it gives the
    last bit of transformers, which takes the power in float32 once a text is longer.

    Raises: ValueError for an odd head_dim, one of 2 where the base is stretched (its only pair
    turns by 1 radian whatever the base), or a base that is not above 1.
    Source: RoFormer, arXiv 2104.09864, eq. 15, and the papers of the types.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number of at least 2, got {head_dim}")
    if not base > 1:
        raise ValueError(f"base: expected more than 1, got {base}")
    scaling = RopeScaling() if scaling is None else scaling
    if head_dim == 2 and scaling.rope_type in ("ntk", "dynamic"):
        raise ValueError("head_dim: expected at least 4 to stretch the base, got 2")
    match scaling.rope_type:
        case "linear":
            return plain_frequencies(head_dim, base) / scaling.factor
        case "ntk":
            return plain_frequencies(head_dim, ntk_base(base, head_dim, scaling.factor))
        case "dynamic":
            return plain_frequencies(head_dim, _dynamic_base(head_dim, base, scaling, seq_len))
        case "yarn":
            return _yarn(head_dim, base, scaling)
        case "llama3":
            return _llama3(head_dim, base, scaling)
    return plain_frequencies(head_dim, base)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln s + 1; 1 for the other types.

    Queries and keys both carry it, so that scores are scaled by its square.

    Source: YaRN, arXiv 2309.00071, eq. 22.
    """
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def plain_frequencies(head_dim: int, base: float | Tensor) -> Float[Tensor, " half"]:
    """RoPE's own angle a position for each pair, base^(-2 i / d), in float32."""
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def ntk_base(base: float, head_dim: int, factor: float) -> float:
    """The base whose slowest pair is `factor` times slower: base * s^(d/(d-2)).

    Source: YaRN, arXiv 2309.00071, sec. 3.1, after a note by bloc97.
    """
    return base * factor ** (head_dim / (head_dim - 2))


def _dynamic_base(
    head_dim: int, base: float, scaling: RopeScaling, seq_len: int | Tensor | None
) -> float | Tensor:
    trained = scaling.original_max_position_embeddings
    assert trained is not None
    length = trained if seq_len is None else max(seq_len, trained)
    growth = scaling.factor * length / trained - (scaling.factor - 1)
    return base * growth ** (head_dim / (head_dim - 2))


def _llama3(head_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """Wavelengths above L / low divided by s, those below L / high kept, a blend between."""
    trained = scaling.original_max_position_embeddings
    assert trained is not None
    frequencies = plain_frequencies(head_dim, base)
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (trained / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = torch.where(wavelengths > trained / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < trained / high, frequencies, stretched)


def yarn_range(head_dim: int, base: float, scaling: RopeScaling) -> tuple[int | float, int | float]:
    """First and last pair of the ramp: those that turn beta_fast and beta_slow times in training.

    Raises: ValueError without the length of training.
    Source: YaRN, arXiv 2309.00071, sec. 3.2, rounded outwards as in its code.
    """
    length = scaling.original_max_position_embeddings
    if length is None:
        raise ValueError("original_max_position_embeddings: the ramp needs the length of training")

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _yarn(head_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    periods = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low, high = yarn_range(head_dim, base, scaling)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
