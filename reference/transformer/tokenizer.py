"""Byte-level BPE: text to ids and back, with a vocabulary learned from text.

Text is UTF-8, so 256 bytes suffice for every text of the world; but one token a byte is long.
Byte-pair encoding merges the most frequent pair of neighbouring tokens into a new one, again and
again. A regular expression cuts the text into words first, and no merge crosses a cut.

    train    count pairs, merge the most frequent (of equals the one with the smallest ids), repeat
    encode   in each word, apply the merges in the order in which they were learned
    decode   put the bytes together; what is no UTF-8 becomes the replacement character

Ids: special tokens, then the 256 bytes in the order of GPT-2's alphabet, then the merges. The same
merges and ids as the `tokenizers` library, but for special tokens that are plain words: where
training spells one, it is a token of its own here, so that text never becomes special unasked.

Papers: BPE for words, 1508.07909, sec. 3.2; on bytes, with this cut: GPT-2 (Radford et al. 2019),
sec. 2.2.
"""

import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex

Pair = tuple[int, int]
END = "<|endoftext|>"
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# GPT-2 shows bytes as letters: printable ones as themselves, the rest after them.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [*PRINTABLE, *(b for b in range(256) if b not in set(PRINTABLE))]


class Tokenizer:
    """A vocabulary: special tokens and merges, in the order of their ids.

    Raises: ValueError for merges of ids that do not exist yet, and for special tokens that are
    empty, single bytes or twice there; TypeError for special tokens that are no strings.
    """

    def __init__(
        self, merges: Iterable[Sequence[int]], special_tokens: Sequence[str] = (END,)
    ) -> None:
        _check_special_tokens(special_tokens)
        self.special_tokens = tuple(special_tokens)
        first = len(self.special_tokens)
        self.pieces = [s.encode() for s in self.special_tokens]
        self.pieces += [bytes([byte]) for byte in ALPHABET]
        self.byte_ids = {byte: first + i for i, byte in enumerate(ALPHABET)}
        self.merges: list[Pair] = []
        self.ranks: dict[Pair, tuple[int, int]] = {}
        known = {piece: first + i for i, piece in enumerate(self.pieces[first:])}
        for left, right in merges:
            if not first <= min(left, right) <= max(left, right) < len(self.pieces):
                raise ValueError(
                    f"merges: expected ids from {first} to {len(self.pieces) - 1} at merge "
                    f"{len(self.merges)}, got {left} and {right}"
                )
            piece = self.pieces[left] + self.pieces[right]
            if piece not in known:
                known[piece] = len(self.pieces)
                self.pieces.append(piece)
            self.ranks[left, right] = len(self.merges), known[piece]
            self.merges.append((left, right))
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @classmethod
    def train(
        cls, text: str, *, vocab_size: int, special_tokens: Sequence[str] = (END,)
    ) -> "Tokenizer":
        """Learn merges until the vocabulary is full, or no pair is left.

        Raises: ValueError for a vocab_size below the bytes and special tokens.
        Source: arXiv 1508.07909, alg. 1.
        """
        tokenizer = cls([], special_tokens)
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size: expected at least {tokenizer.vocab_size} (256 bytes and the special "
                f"tokens), got {vocab_size}"
            )
        words = Counter(WORD.findall(text))
        ids = [[tokenizer.byte_ids[byte] for byte in word.encode()] for word in words]
        merges = _learn(ids, list(words.values()), tokenizer, vocab_size)
        return cls(merges, special_tokens)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text. Special tokens in it are text unless allowed; the longest that fits wins.

        Raises: TypeError for anything but a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        if not allow_special or not self.special_tokens:
            return [i for word in WORD.findall(text) for i in self._encode_word(word)]
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        pattern = "(" + "|".join(regex.escape(s) for s in longest_first) + ")"
        found: list[int] = []
        for part in regex.split(pattern, text):
            if part in self.special_tokens:
                found.append(self.special_tokens.index(part))
            else:
                found += self.encode(part)
        return found

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._words:
            ids = [self.byte_ids[byte] for byte in word.encode("utf-8", "surrogatepass")]
            while len(ids) > 1:
                ranks = [self.ranks.get(pair) for pair in zip(ids, ids[1:], strict=False)]
                best = min((rank for rank in ranks if rank), default=None)
                if best is None:
                    break
                ids = merge(ids, self.merges[best[0]], best[1])
            self._words[word] = ids
        return self._words[word]

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
        """Write merges and special tokens as JSON; an older file stays until this one is whole."""
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


def _check_special_tokens(special_tokens: Sequence[str]) -> None:
    if isinstance(special_tokens, str) or not all(isinstance(s, str) for s in special_tokens):
        raise TypeError(f"special_tokens: expected strings in a tuple, got {special_tokens!r}")
    if any(len(s.encode()) < 2 for s in special_tokens):
        raise ValueError(f"special_tokens: expected two bytes or more, got {special_tokens!r}")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens: expected each once, got {special_tokens!r}")


def merge(ids: Sequence[int], pair: Pair, new_id: int) -> list[int]:
    """Replace each occurrence of the pair, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def _learn(
    words: list[list[int]], counts: list[int], tokenizer: Tokenizer, vocab_size: int
) -> list[Pair]:
    """Merges in their order. Only words that hold a merged pair are looked at again."""
    known = {bytes([byte]): i for byte, i in tokenizer.byte_ids.items()}
    pieces, merges = list(tokenizer.pieces), []
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, ids in enumerate(words):
        for pair in zip(ids, ids[1:], strict=False):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if -negative != pairs[pair]:  # counted before something changed
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        piece = pieces[pair[0]] + pieces[pair[1]]
        new_id = known.setdefault(piece, len(pieces))
        if new_id == len(pieces):
            pieces.append(piece)
        merges.append(pair)
        grown = _merge_everywhere(words, counts, pairs, where, pair, new_id)
        for changed in grown:
            heapq.heappush(heap, (-pairs[changed], changed))
    return merges


def _merge_everywhere(
    words: list[list[int]],
    counts: list[int],
    pairs: Counter[Pair],
    where: defaultdict[Pair, set[int]],
    pair: Pair,
    new_id: int,
) -> set[Pair]:
    """Merge a pair in all words that hold it; the pairs that are now in more places."""
    grown = set()
    for i in where.pop(pair):
        old, words[i] = words[i], merge(words[i], pair, new_id)
        for gone in zip(old, old[1:], strict=False):
            pairs[gone] -= counts[i]
        for come in zip(words[i], words[i][1:], strict=False):
            pairs[come] += counts[i]
            where[come].add(i)
            grown.add(come)
    pairs.pop(pair, None)
    return grown
