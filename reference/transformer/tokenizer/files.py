"""Vocabularies of others: GPT-2's vocab.json and merges.txt, and Hugging Face's tokenizer.json.

Both write the bytes of a piece as letters, in GPT-2's alphabet. A tokenizer.json may say more than
a byte-level BPE: what it says is honoured, or refused by name. Added tokens are special tokens
here, so that `encode(text, allow_special="all")` has the ids of `tokenizers` without its
post-processor, which puts tokens around a text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from reference.transformer.tokenizer.bpe import Tokenizer
from reference.transformer.tokenizer.cutting import GPT2
from reference.transformer.tokenizer.vocabulary import ALPHABET, END, PRINTABLE

LETTERS = [*map(chr, PRINTABLE), *(chr(256 + i) for i in range(256 - len(PRINTABLE)))]
BYTE_OF = dict(zip(LETTERS, ALPHABET, strict=True))
# What changes nothing where every byte has an id of its own.
HARMLESS = {"type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"}


def read_gpt2_files(
    vocab: Path | str, merges: Path | str, special_tokens: Sequence[str] = (END,)
) -> Tokenizer:
    """The tokenizer of a vocab.json, pieces to ids, and a merges.txt, one pair a line.

    Raises: ValueError for files of another kind; as `Tokenizer.from_vocabulary`.
    """
    ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
    lines = Path(merges).read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    return Tokenizer.from_vocabulary(
        _pieces(ids, {s: ids[s] for s in special_tokens if s in ids}), _pairs(lines), special_tokens
    )


def read_tokenizer_json(path: Path | str) -> Tokenizer:
    """The tokenizer of a tokenizer.json that holds a byte-level BPE.

    Raises: ValueError for anything in it that this tokenizer does not do, by its name.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"{path}: expected a model of type BPE, got {model.get('type')!r}")
    for name in ("normalizer", "truncation", "padding"):
        _refuse(name, content.get(name))
    for name, value in model.items():
        if name not in HARMLESS:
            _refuse(f"model.{name}", value)
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    for token in content.get("added_tokens", ()):
        for option in ("lstrip", "rstrip", "single_word"):
            _refuse(f"{option} of the added token {token['content']!r}", token.get(option))
    return Tokenizer.from_vocabulary(
        _pieces(model["vocab"], added),
        _pairs(model["merges"]),
        tuple(added),
        patterns=_patterns(content.get("pre_tokenizer")),
        ignore_merges=bool(model.get("ignore_merges")),
    )


def _refuse(name: str, value: Any) -> None:
    if value:
        raise ValueError(f"{name}: expected none, got {value!r}; this tokenizer has no such thing")


def _pieces(vocab: Mapping[str, int], added: Mapping[str, int]) -> dict[int, bytes]:
    """Bytes by id; added tokens are plain text, all others in GPT-2's alphabet."""
    pieces = {i: _bytes_of(piece) for piece, i in vocab.items() if piece not in added}
    return pieces | {i: piece.encode() for piece, i in added.items()}


def _pairs(merges: Iterable[str | Sequence[str]]) -> Iterable[tuple[bytes, bytes]]:
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise ValueError(f"merges: expected two pieces, got {merge!r}")
        yield _bytes_of(pair[0]), _bytes_of(pair[1])


def _bytes_of(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF[letter] for letter in piece)
    except KeyError as error:
        raise ValueError(
            f"vocabulary: expected pieces in GPT-2's alphabet of bytes, got {piece!r}; it is not "
            "one of byte-level BPE"
        ) from error


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The expressions that a pre-tokenizer cuts by, one after the other."""
    steps = [pre_tokenizer or {"type": "nothing"}]
    if steps[0]["type"] == "Sequence":
        steps = list(steps[0]["pretokenizers"])
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise ValueError(f"pre_tokenizer: expected ByteLevel at its end, got {pre_tokenizer!r}")
    _refuse("add_prefix_space", steps[-1].get("add_prefix_space", True))
    patterns = [_pattern(step) for step in steps[:-1]]
    return (*patterns, GPT2) if steps[-1].get("use_regex", True) else tuple(patterns)


def _pattern(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step["type"] != "Split":
        raise ValueError(f"pre_tokenizer: expected Split, Digits or ByteLevel, got {step['type']}")
    if step.get("behavior") != "Isolated" or step.get("invert"):
        raise ValueError(f"pre_tokenizer: expected a Split that isolates, got {dict(step)!r}")
    pattern = step["pattern"]
    return str(pattern["Regex"]) if "Regex" in pattern else str(regex.escape(pattern["String"]))
