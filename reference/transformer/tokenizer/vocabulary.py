"""GPT-2's alphabet of bytes, and what a vocabulary must have."""

from collections.abc import Mapping, Sequence

from reference.transformer.tokenizer.learning import Pair

END = "<|endoftext|>"
# GPT-2 shows bytes as letters: printable ones as themselves, the rest after them.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [*PRINTABLE, *(b for b in range(256) if b not in set(PRINTABLE))]


def check_special_tokens(special_tokens: Sequence[str]) -> None:
    """Refuse special tokens that are empty, single bytes, no strings or twice there."""
    if isinstance(special_tokens, str) or not all(isinstance(s, str) for s in special_tokens):
        raise TypeError(f"special_tokens: expected strings in a tuple, got {special_tokens!r}")
    if any(len(s.encode()) < 2 for s in special_tokens):
        raise ValueError(f"special_tokens: expected two bytes or more, got {special_tokens!r}")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens: expected each once, got {special_tokens!r}")


def check_pieces(pieces: list[bytes], known: dict[bytes, int], special: set[bytes]) -> None:
    """Refuse a vocabulary in which a piece has two ids, or a byte has none."""
    if len(known) + len(special) < len(pieces):
        raise ValueError("vocabulary: expected each piece once, got one that has two ids")
    missing = [byte for byte in ALPHABET if bytes([byte]) not in known]
    if missing:
        raise ValueError(
            f"vocabulary: expected all 256 bytes as pieces, got none for {bytes(missing[:8])!r}; "
            "it is not one of byte-level BPE"
        )


def known_pair(known: Mapping[bytes, int], left: bytes, right: bytes) -> Pair:
    """The ids of two pieces that merge into a third one."""
    for piece in (left, right, left + right):
        if piece not in known:
            raise ValueError(f"merges: expected pieces of the vocabulary, got {piece!r}")
    return known[left], known[right]
