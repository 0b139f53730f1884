import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from reference.kv_cache import BlockManager, OutOfBlocks

BLOCK = 3


class Memory(RuleBasedStateMachine):
    """A manager beside a model that knows only tokens: every block is written as a cache would.

    `written` is what the slots hold. A sequence must read its own tokens there whatever others do.
    """

    names = Bundle("names")

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(12, BLOCK)
        self.written = [[None] * BLOCK for _ in range(12)]
        self.tokens = {}
        self.counter = 0

    def write(self, name, start):
        for i in range(start, len(self.tokens[name])):
            block = self.blocks.tables[name][i // BLOCK]
            self.written[block][i % BLOCK] = self.tokens[name][i]

    def state(self):
        blocks = self.blocks
        return (
            {k: list(v) for k, v in blocks.tables.items()}, dict(blocks.lengths),
            list(blocks.references), sorted(blocks._free), dict(blocks._index),
        )  # fmt: skip

    def attempt(self, call):
        before = self.state()
        try:
            return call()
        except OutOfBlocks:
            assert self.state() == before, "a call that raised changed something"
            return None

    @rule(target=names, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11))
    def allocate(self, tokens):
        self.counter += 1
        name = self.counter
        cached = self.attempt(lambda: self.blocks.allocate(name, tokens))
        if cached is None:
            return multiple()
        assert cached < len(tokens) and cached % BLOCK == 0
        self.tokens[name] = list(tokens)
        self.write(name, cached)
        self.blocks.publish(name, tokens)
        return name

    @rule(name=names, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def append(self, name, tokens):
        copies = self.attempt(lambda: self.blocks.append(name, len(tokens)))
        if copies is None:
            return
        for source, target in copies:
            self.written[target] = list(self.written[source])
        start = len(self.tokens[name])
        self.tokens[name] += tokens
        self.write(name, start)

    @rule(target=names, parent=names)
    def fork(self, parent):
        self.counter += 1
        self.blocks.fork(parent, self.counter)
        self.tokens[self.counter] = list(self.tokens[parent])
        return self.counter

    @rule(name=consumes(names))
    def free(self, name):
        self.blocks.free(name)
        del self.tokens[name]
        with pytest.raises(KeyError):
            self.blocks.free(name)

    @invariant()
    def nothing_is_leaked_or_freed_twice(self):
        self.blocks.check()
        used = {block for table in self.blocks.tables.values() for block in table}
        assert self.blocks.num_free == 12 - len(used)
        assert len(set(self.blocks._free)) == len(self.blocks._free)

    @invariant()
    def everybody_reads_what_he_wrote(self):
        for name, tokens in self.tokens.items():
            table = self.blocks.tables[name]
            held = [self.written[table[i // BLOCK]][i % BLOCK] for i in range(len(tokens))]
            assert held == tokens

    def teardown(self):
        for name in list(self.tokens):
            self.blocks.free(name)
        assert self.blocks.num_free == 12 and not self.blocks._index


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_invariant_equal_prompts_share_full_blocks():
    blocks = BlockManager(10, 4)
    prompt = list(range(10))
    assert blocks.allocate("a", prompt) == 0
    assert blocks.allocate("early", prompt) == 0  # nothing is computed yet
    blocks.publish("a", prompt)
    assert blocks.allocate("b", prompt) == 8
    assert blocks.tables["b"][:2] == blocks.tables["a"][:2]
    assert blocks.tables["b"][2] != blocks.tables["a"][2]
    assert blocks.shared_prefix(prompt[4:]) == []  # the same tokens at another place
    assert len(blocks.shared_prefix(prompt[:8])) == 1  # the last token is always computed


def test_invariant_a_shared_block_is_copied_once_and_kept_by_the_last():
    blocks = BlockManager(10, 4)
    blocks.allocate(0, range(6))
    blocks.fork(0, 1)
    blocks.fork(0, 2)
    tail = blocks.tables[0][1]
    assert blocks.append(0) == [(tail, blocks.tables[0][1])]
    assert blocks.append(1) == [(tail, blocks.tables[1][1])]
    assert blocks.append(2) == [] and blocks.tables[2][1] == tail
    assert len({blocks.tables[i][1] for i in range(3)}) == 3
    assert {blocks.tables[i][0] for i in range(3)} == {blocks.tables[0][0]}


def test_rejects_misuse():
    for counts, name in (((0, 4), "num_blocks"), ((4, 0), "block_size")):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            BlockManager(*counts)
    blocks = BlockManager(2, 4)
    blocks.allocate("a", [1])
    for call, message in (
        (lambda: blocks.allocate("a", [1]), "name: 'a' is in use"),
        (lambda: blocks.allocate("b", []), "tokens: expected at least one"),
        (lambda: blocks.append("a", 0), "num_tokens: expected at least 1, got 0"),
        (lambda: blocks.fork("a", "a"), "child: 'a' is in use"),
        (lambda: blocks.publish("a", [1, 2]), "expected at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 of 2 free"):
        blocks.allocate("b", range(5))
