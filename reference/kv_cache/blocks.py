"""Who owns which block: the bookkeeping of a paged cache, without a tensor.

Memory is cut into blocks of a few tokens. A sequence has a block table, the list of its blocks in
order; they lie anywhere. So nothing is reserved ahead, at most the last block has empty slots, and
two sequences that begin alike can point at the same blocks.

    free list            blocks that nobody points at
    reference counts     how many tables name a block; at zero it is free again
    copy-on-write        a sequence that would write into a shared block first gets its own copy
    prefix index         full blocks by (block before, tokens inside): equal prompts share them

Source: vLLM, arXiv 2309.06180, sec. 4.2 to 4.4.
"""

from collections.abc import Hashable, Sequence


class OutOfBlocks(RuntimeError):
    """No free block is left; nothing was changed."""


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens to named sequences.

    A call that raises changes nothing.

    Raises: ValueError for counts below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, count in (("num_blocks", num_blocks), ("block_size", block_size)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tables: dict[Hashable, list[int]] = {}
        self.lengths: dict[Hashable, int] = {}
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks))[::-1]
        self._index: dict[tuple[int | None, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody points at."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def shared_prefix(self, tokens: Sequence[int]) -> list[int]:
        """Blocks that already hold the beginning of `tokens`; the last token is never among them.

        The last token has to go through the model in any case, to give the next one's logits.
        """
        found: list[int] = []
        for end in range(self.block_size, len(tokens), self.block_size):
            parent = found[-1] if found else None
            block = self._index.get((parent, tuple(tokens[end - self.block_size : end])))
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, name: Hashable, tokens: Sequence[int]) -> int:
        """Begin a sequence with room for `tokens`; returns how many of them are there already.

        Raises: ValueError for a name in use or no tokens; OutOfBlocks.
        """
        if name in self.tables:
            raise ValueError(f"name: {name!r} is in use; free it first")
        if not len(tokens):
            raise ValueError("tokens: expected at least one, got none")
        shared = self.shared_prefix(tokens)
        fresh = self._take(self.blocks_for(len(tokens)) - len(shared))
        for block in shared:
            self.references[block] += 1
        self.tables[name] = shared + fresh
        self.lengths[name] = len(tokens)
        return len(shared) * self.block_size

    def append(self, name: Hashable, num_tokens: int = 1) -> list[tuple[int, int]]:
        """Make room for more tokens; returns the copies (from, to) to make before writing.

        Raises: KeyError for an unknown name; ValueError for fewer than one token; OutOfBlocks.
        """
        if num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
        table, length = self.tables[name], self.lengths[name]
        is_shared = length % self.block_size != 0 and self.references[table[-1]] > 1
        missing = self.blocks_for(length + num_tokens) - len(table)
        fresh = self._take(missing + is_shared)
        copies = []
        if is_shared:
            copies = [(table[-1], fresh[0])]
            self._drop(table[-1])
            table[-1] = fresh.pop(0)
        table += fresh
        self.lengths[name] = length + num_tokens
        return copies

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A second sequence with the same tokens, in the same blocks.

        Raises: KeyError for an unknown parent; ValueError for a child's name in use.
        """
        if child in self.tables:
            raise ValueError(f"child: {child!r} is in use; free it first")
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]
        for block in self.tables[child]:
            self.references[block] += 1

    def free(self, name: Hashable) -> None:
        """End a sequence; blocks that nobody else points at are free again.

        Raises: KeyError for an unknown name, one that was freed before among them.
        """
        table = self.tables.pop(name)
        del self.lengths[name]
        for block in reversed(table):
            self._drop(block)

    def publish(self, name: Hashable, tokens: Sequence[int]) -> None:
        """Let later sequences share this one's full blocks, once their keys are computed.

        Raises: KeyError for an unknown name; ValueError for more tokens than it has.
        """
        table = self.tables[name]
        if len(tokens) > self.lengths[name]:
            raise ValueError(
                f"tokens: expected at most {self.lengths[name]} (those held), got {len(tokens)}"
            )
        parent = None
        for i in range(len(tokens) // self.block_size):
            part = tuple(tokens[i * self.block_size : (i + 1) * self.block_size])
            if (parent, part) not in self._index and table[i] not in self._key_of:
                self._index[parent, part] = table[i]
                self._key_of[table[i]] = (parent, part)
            parent = table[i]

    def check(self) -> None:
        """Assert that no block is leaked, freed twice, or counted wrong."""
        counted = [0] * self.num_blocks
        for name, table in self.tables.items():
            assert len(table) == self.blocks_for(self.lengths[name]), f"{name!r}: table too long"
            assert len(set(table)) == len(table), f"{name!r}: a block comes twice"
            for block in table:
                counted[block] += 1
        assert counted == self.references, "reference counts differ from the tables"
        free = [block for block, count in enumerate(counted) if count == 0]
        assert sorted(self._free) == free, "the free list differs from the unused blocks"
        assert all(counted[block] for block in self._key_of), "a freed block is in the index"

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks needed, {len(self._free)} of {self.num_blocks} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def _drop(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            self._free.append(block)
            if block in self._key_of:
                del self._index[self._key_of.pop(block)]
