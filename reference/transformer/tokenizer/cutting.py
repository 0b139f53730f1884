"""Text cut into words, which merges do not cross: in one pass, or piece by piece from a stream."""

from collections.abc import Iterable, Iterator, Sequence

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Words at the end of a text whose cut the next character may change: two, and two to be safe.
UNDECIDED = 4
# Characters that are read ahead before a stream is cut.
READ_AHEAD = 1 << 16


class Cutter:
    """Cuts by one expression after another; what an expression leaves out is a word as well.

    The characters that an expression calls letters are those of the Unicode version of `regex`.
    """

    def __init__(self, patterns: Sequence[str] = (GPT2,)) -> None:
        self.patterns = tuple(patterns)
        self._stages = [regex.compile(pattern) for pattern in self.patterns]

    def cut(self, text: str) -> list[str]:
        """The words of a text; joined, they are the text again."""
        if self.patterns == (GPT2,):  # it leaves nothing out
            return self._stages[0].findall(text)
        words = [text] if text else []
        for stage in self._stages:
            words = [part for word in words for part in _cut_by(stage, word)]
        return words

    def cut_stream(self, texts: Iterable[str]) -> Iterator[str]:
        """The words of the joined texts, with little more of them in memory than one word."""
        rest, parts, size, enough = "", [], 0, READ_AHEAD
        for text in texts:
            parts.append(text)
            size += len(text)
            if size < enough:
                continue
            words = self.cut(rest + "".join(parts))
            decided = words[:-UNDECIDED]
            yield from decided
            rest, parts, size = "".join(words[len(decided) :]), [], 0
            enough = max(READ_AHEAD, len(rest))  # a long word is not cut again for each text
        yield from self.cut(rest + "".join(parts))


def split_off(text: str, specials: Sequence[str]) -> list[str]:
    """The text between special tokens, and every second part one of them; the longest that fits."""
    if not specials:
        return [text]
    longest_first = sorted(specials, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text)


def split_stream(texts: Iterable[str], specials: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Parts of the joined texts, and whether each is a special token; text comes in any parts."""
    longest = max(map(len, specials), default=1)
    rest = ""
    for text in texts:
        rest += text
        limit, start = len(rest) - longest + 1, 0  # behind it a token may have only begun
        for i, part in enumerate(split_off(rest, specials)):
            end = start + len(part)
            if i % 2:
                if start >= limit:
                    break
                yield True, part
            elif end > limit:
                end = max(start, limit)
                yield False, rest[start:end]
                start = end
                break
            else:
                yield False, part
            start = end
        rest = rest[start:]
    for i, part in enumerate(split_off(rest, specials)):
        yield bool(i % 2), part


def repair(text: str) -> str:
    """Surrogates that are not UTF-8: a pair becomes its character, a lone one U+FFFD (tiktoken)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def whole(text: str) -> str:
    """The text, repaired where it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return repair(text)
    return text


def _cut_by(stage: "regex.Pattern[str]", word: str) -> Iterator[str]:
    end = 0
    for match in stage.finditer(word):
        if match.start() > end:
            yield word[end : match.start()]
        if match.end() > match.start():
            yield match.group()
        end = match.end()
    if end < len(word):
        yield word[end:]
