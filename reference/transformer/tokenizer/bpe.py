"""The tokenizer itself: a vocabulary, merges by rank, and what to do with special tokens.

Ids of a vocabulary that is trained here: special tokens, then the 256 bytes in the order of GPT-2's
alphabet, then the merges. The same merges and ids as the `tokenizers` library, but for special
tokens that are plain words: where training spells one, it is a token of its own here, so that text
never becomes special unasked. A given vocabulary keeps its ids.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

from reference.transformer.tokenizer.cutting import (
    GPT2,
    Cutter,
    repair,
    split_off,
    split_stream,
    whole,
)
from reference.transformer.tokenizer.learning import Pair, learn, merge
from reference.transformer.tokenizer.vocabulary import (
    ALPHABET,
    END,
    check_pieces,
    check_special_tokens,
    known_pair,
)

# Words whose ids are remembered; then the memory is emptied. Long words rarely come again.
REMEMBERED_WORDS, REMEMBERED_LETTERS = 1 << 15, 64

Chosen = Collection[str] | Literal["all"] | bool


class Tokenizer:
    """A vocabulary: special tokens and merges, in the order of their ids.

    Raises: ValueError for merges of ids that do not exist yet, and for special tokens that are
    empty, single bytes or twice there; TypeError for special tokens that are no strings.
    """

    def __init__(
        self, merges: Iterable[Sequence[int]], special_tokens: Sequence[str] = (END,)
    ) -> None:
        check_special_tokens(special_tokens)
        first = len(special_tokens)
        pieces = [s.encode() for s in special_tokens] + [bytes([byte]) for byte in ALPHABET]
        known = {piece: first + i for i, piece in enumerate(pieces[first:])}
        pairs: list[Pair] = []
        for left, right in merges:
            if not first <= min(left, right) <= max(left, right) < len(pieces):
                raise ValueError(
                    f"merges: expected ids from {first} to {len(pieces) - 1} at merge "
                    f"{len(pairs)}, got {left} and {right}"
                )
            piece = pieces[left] + pieces[right]
            if piece not in known:
                known[piece] = len(pieces)
                pieces.append(piece)
            pairs.append((left, right))
        self._fill(pieces, known, pairs, {s: i for i, s in enumerate(special_tokens)})

    def _fill(
        self,
        pieces: list[bytes],
        known: dict[bytes, int],
        merges: list[Pair],
        special_ids: dict[str, int],
    ) -> None:
        self.pieces, self.merges, self.special_ids = pieces, merges, special_ids
        self.special_tokens = tuple(special_ids)
        self.byte_ids = {byte: known[bytes([byte])] for byte in ALPHABET}
        self.ranks: dict[Pair, tuple[int, int]] = {
            (left, right): (rank, known[pieces[left] + pieces[right]])
            for rank, (left, right) in enumerate(merges)
        }
        self.cutter = Cutter()
        self.whole_words: dict[bytes, int] = {}  # these are not taken apart (ignore_merges)
        self._is_given = False
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] = (),
        *,
        patterns: Sequence[str] = (GPT2,),
        ignore_merges: bool = False,
    ) -> "Tokenizer":
        """From the bytes of each id and the pairs that merge, in the order of their ranks.

        Special tokens that the vocabulary does not name get the ids behind it. `patterns` cut the
        text into words, one after the other; with `ignore_merges` a word that is in the vocabulary
        is one token whatever the merges say (Llama 3).

        Raises: ValueError for ids with gaps, a byte that has no id, two ids of one piece, merges of
        or into pieces that are not there; as the constructor for special tokens.
        """
        check_special_tokens(special_tokens)
        special = {s.encode() for s in special_tokens}
        pieces = [vocabulary[i] for i in range(len(vocabulary)) if i in vocabulary]
        if len(pieces) != len(vocabulary):
            raise ValueError(
                f"vocabulary: expected ids from 0 to {len(vocabulary) - 1} without a gap, got "
                f"{len(vocabulary)} of them up to {max(vocabulary)}"
            )
        pieces += [s.encode() for s in special_tokens if s.encode() not in pieces]
        known = {piece: i for i, piece in enumerate(pieces) if piece not in special}
        special_ids = {s: pieces.index(s.encode()) for s in special_tokens}
        check_pieces(pieces, known, special)
        pairs = [known_pair(known, left, right) for left, right in merges]
        tokenizer = cls.__new__(cls)
        tokenizer._fill(pieces, known, pairs, special_ids)
        tokenizer._is_given = True
        tokenizer.cutter = Cutter(patterns)
        tokenizer.whole_words = known if ignore_merges else {}
        return tokenizer

    @classmethod
    def train(
        cls,
        text: str,
        *,
        vocab_size: int,
        special_tokens: Sequence[str] = (END,),
        cut_special: bool = False,
    ) -> "Tokenizer":
        """Learn merges until the vocabulary is full, or no pair is left.

        With `cut_special` no merge is learned from special tokens in the text or across them. By
        default they are text, as in the `tokenizers` library, whose merges come out then.

        Raises: ValueError for a vocab_size below the bytes and special tokens.
        Source: arXiv 1508.07909, alg. 1.
        """
        tokenizer = cls([], special_tokens)
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size: expected at least {tokenizer.vocab_size} (256 bytes and the special "
                f"tokens), got {vocab_size}"
            )
        parts = split_off(whole(text), tokenizer.special_tokens if cut_special else ())[::2]
        words = Counter(word for part in parts for word in tokenizer.cutter.cut(part))
        ids = [[tokenizer.byte_ids[byte] for byte in word.encode()] for word in words]
        merges = learn(ids, list(words.values()), tokenizer.pieces, vocab_size)
        return cls(merges, special_tokens)

    def encode(
        self, text: str, *, allow_special: Chosen = False, disallow_special: Chosen = ()
    ) -> list[int]:
        """Ids of a text. Special tokens in it are text unless allowed; the longest that fits wins.

        Both options name special tokens, or "all" of them (True). Those allowed become their ids;
        those disallowed, and not allowed, are refused: what users write should not become
        special, nor be taken for it later. tiktoken disallows all by default.

        Raises: TypeError for anything but a string; ValueError for a disallowed token in the text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        allowed = self._choose(allow_special)
        refused = [s for s in self._choose(disallow_special) if s not in allowed]
        found = split_off(text, refused)[1::2]
        if found:
            raise ValueError(
                f"text: expected no special token, got {found[0]!r}; allow_special makes it one, "
                "and without disallow_special it is text"
            )
        ids: list[int] = []
        for i, part in enumerate(split_off(text, allowed)):
            ids += [self.special_ids[part]] if i % 2 else self._encode_text(part)
        return ids

    def encode_iterable(
        self, texts: Iterable[str], *, allow_special: Chosen = False
    ) -> Iterator[int]:
        """The ids of the joined texts, one by one, in the memory of the longest word.

        For files that do not fit into memory: `encode_iterable(open(path))` gives what `encode`
        does of the whole.

        Raises: as `encode`.
        """
        parts = split_stream(map(whole, texts), self._choose(allow_special))
        for is_special, group in groupby(parts, key=itemgetter(0)):
            if is_special:
                yield from (self.special_ids[part] for _, part in group)
                continue
            for word in self.cutter.cut_stream(part for _, part in group):
                yield from self._encode_word(word)

    def _choose(self, chosen: Chosen) -> tuple[str, ...]:
        if isinstance(chosen, bool) or chosen == "all":
            return self.special_tokens if chosen else ()
        unknown = [s for s in chosen if s not in self.special_ids]
        if isinstance(chosen, str) or unknown:
            raise ValueError(f"expected special tokens of {self.special_tokens}, got {chosen!r}")
        return tuple(chosen)

    def _encode_text(self, text: str) -> list[int]:
        try:
            return [i for word in self.cutter.cut(text) for i in self._encode_word(word)]
        except UnicodeEncodeError:
            return self._encode_text(repair(text))

    def _encode_word(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            ids = self._merge_word(word.encode())
            if len(word) <= REMEMBERED_LETTERS:
                if len(self._words) >= REMEMBERED_WORDS:
                    self._words.clear()
                self._words[word] = ids
        return ids

    def _merge_word(self, word: bytes) -> list[int]:
        if word in self.whole_words:
            return [self.whole_words[word]]
        ids = [self.byte_ids[byte] for byte in word]
        while len(ids) > 1:
            ranks = [self.ranks.get(pair) for pair in zip(ids, ids[1:], strict=False)]
            best = min((rank for rank in ranks if rank), default=None)
            if best is None:
                break
            ids = merge(ids, self.merges[best[0]], best[1])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are no UTF-8, such as half a letter, become U+FFFD.

        Raises: ValueError for an id that is not in the vocabulary.
        """
        pieces = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {i}")
            pieces.append(self.pieces[i])
        return b"".join(pieces).decode("utf-8", "replace")

    def save(self, path: Path | str) -> None:
        """Write merges and special tokens as JSON; an older file stays until this one is whole.

        Raises: ValueError for a given vocabulary, whose ids do not follow from the merges.
        """
        if self._is_given:
            raise ValueError(
                "save: expected a vocabulary of Tokenizer.train, got a given one; keep its files"
            )
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        content = {"special_tokens": self.special_tokens, "merges": self.merges}
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read what `save` wrote.

        Raises: ValueError for a file that is cut or of another kind.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["merges"], content["special_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a file of Tokenizer.save ({error})") from error
