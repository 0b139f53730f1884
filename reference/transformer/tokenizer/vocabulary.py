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


def number(
    vocabulary: Mapping[int, bytes], special_tokens: Sequence[str]
) -> tuple[list[bytes], dict[bytes, int], dict[str, int]]:
    """Pieces by id, ids of all that are not special, and of the special tokens.

    Raises: ValueError for ids with gaps, a piece with two ids, a printable byte without one.
    """
    check_special_tokens(special_tokens)
    pieces = [vocabulary[i] for i in range(len(vocabulary)) if i in vocabulary]
    if len(pieces) != len(vocabulary):
        raise ValueError(
            f"vocabulary: expected ids from 0 to {len(vocabulary) - 1} without a gap, got "
            f"{len(vocabulary)} of them up to {max(vocabulary)}"
        )
    special = [s.encode() for s in special_tokens]
    pieces += [piece for piece in special if piece not in pieces]
    known = {piece: i for i, piece in enumerate(pieces) if piece not in special}
    if len(known) + len(special) < len(pieces):
        raise ValueError("vocabulary: expected each piece once, got one that has two ids")
    missing = bytes(byte for byte in range(33, 127) if bytes([byte]) not in known)
    if missing:  # others may be missing: SmolLM2 has no id for control bytes such as 0x04
        raise ValueError(
            f"vocabulary: expected all printable ASCII bytes as pieces, got none for {missing!r}; "
            "it is not one of byte-level BPE"
        )
    return pieces, known, {s: pieces.index(s.encode()) for s in special_tokens}


def known_pair(known: Mapping[bytes, int], left: bytes, right: bytes) -> Pair:
    """The ids of two pieces that merge into a third one."""
    for piece in (left, right, left + right):
        if piece not in known:
            raise ValueError(f"merges: expected pieces of the vocabulary, got {piece!r}")
    return known[left], known[right]
