"""The merges of a text: the most frequent pair of neighbours, again and again.

Of pairs that are equally frequent the one with the smallest ids is first: the smaller left id, then
the smaller right one. The `tokenizers` library does the same; minbpe takes the pair that it met
first, and others the largest bytes, so that their merges differ where counts are equal.

Paper: 1508.07909, alg. 1.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence

Pair = tuple[int, int]


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


def learn(
    words: list[list[int]], counts: Sequence[int], pieces: list[bytes], vocab_size: int
) -> list[Pair]:
    """Merges in their order, for words in the ids of `pieces`, which grow in place.

    Only words that hold a merged pair are looked at again. A piece that exists is not made twice;
    special tokens, which `words` do not use, do not count.
    """
    used = {i for word in words for i in word}
    known = {pieces[i]: i for i in used}
    merges: list[Pair] = []
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
    counts: Sequence[int],
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
