import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.pretrained import corpus, passage
from reference.transformer.tokenizer import END, Tokenizer, merge

TEXT = corpus()[:60_000]
SIZE = 600
OURS = Tokenizer.train(TEXT, vocab_size=SIZE)


@pytest.fixture(scope="module")
def theirs():
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    oracle.train_from_iterator([TEXT], trainer)
    return oracle


def test_matches_the_vocabulary_of_tokenizers(theirs):
    assert OURS.vocab_size == theirs.get_vocab_size() == SIZE
    vocabulary = {i: token for token, i in theirs.get_vocab().items()}
    for i in range(1, SIZE):
        assert OURS.decode([i]) == theirs.decoder.decode([vocabulary[i]])


def test_matches_the_merges_of_tokenizers(theirs):
    letters = theirs.get_vocab()
    expected = json.loads(theirs.to_str())["model"]["merges"]
    assert OURS.merges == [(letters[left], letters[right]) for left, right in expected]


@pytest.mark.parametrize(
    "text",
    [
        passage(),
        TEXT[5000:9000],
        "",
        " ",
        "\n\n  x\t\ty ",
        "it's we'll 12,345.6",
        "naïve 東京 🙂\u0301",
    ],
    ids=range(7),
)
def test_matches_the_ids_of_tokenizers(theirs, text):
    assert OURS.encode(text) == theirs.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_invariant_any_text_comes_back(theirs, text):
    ids = OURS.encode(text)
    assert OURS.decode(ids) == text
    assert ids == theirs.encode(text).ids or END in text


def test_special_tokens_are_text_unless_allowed():
    text = f"one{END}two"
    assert 0 not in OURS.encode(text)
    ids = OURS.encode(text, allow_special=True)
    assert ids.count(0) == 1 and OURS.decode(ids) == text
    assert ids == [*OURS.encode("one"), 0, *OURS.encode("two")]


def test_the_longest_special_token_wins():
    assert Tokenizer([], ("ab", "abc")).encode("abcab", allow_special=True) == [1, 0]


def test_a_learned_word_is_not_the_special_token_of_its_letters():
    learned = Tokenizer.train("ab\nab\nabc abc", vocab_size=260, special_tokens=("ab",))
    assert learned.vocab_size == 260 and 0 not in learned.encode("ab abc ab")
    assert learned.encode("ab", allow_special=True) == [0] != learned.encode("ab")


def test_half_a_letter_becomes_the_replacement_character():
    ids = OURS.encode("é")
    assert OURS.decode(ids) == "é"
    assert OURS.decode([OURS.byte_ids[0xC3]]) == "\ufffd"


def test_merges_from_left_to_right():
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]
    assert merge([], (1, 2), 9) == [] and merge([1], (1, 2), 9) == [1]


def test_learns_the_pairs_of_the_original_paper():
    """arXiv 1508.07909, sec. 3.2: low, lower, newest, widest with their counts."""
    text = " low" * 5 + " lower" * 2 + " newest" * 6 + " widest" * 3
    learned = Tokenizer.train(text, vocab_size=257 + 3)
    assert learned.pieces[-3:-1] == [b"es", b"est"]


def test_stops_where_no_pair_is_left():
    learned = Tokenizer.train("ab", vocab_size=1000)
    assert learned.vocab_size == 258 and learned.encode("ab") == [257]


def test_saved_and_loaded_is_the_same(tmp_path):
    OURS.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.pieces == OURS.pieces and again.encode(TEXT) == OURS.encode(TEXT)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_rejects_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (
        '{"merges": [[1, 2]',
        "{}",
        "[]",
        '{"merges": [[1, 999]], "special_tokens": []}',
        '{"merges": [], "special_tokens": [1]}',
        '{"merges": [], "special_tokens": "abc"}',
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="expected a file of Tokenizer.save"):
            Tokenizer.load(path)


def test_rejects_sizes_ids_and_types():
    with pytest.raises(ValueError, match="vocab_size: expected at least 257"):
        Tokenizer.train("a", vocab_size=256)
    with pytest.raises(ValueError, match="ids: expected 0 to 599, got 600"):
        OURS.decode([600])
    with pytest.raises(ValueError, match="got -1"):
        OURS.decode([-1])
    with pytest.raises(TypeError, match="expected a string, got bytes"):
        OURS.encode(b"x")


@pytest.mark.parametrize("special_tokens", [("",), ("e",), ("ab", "ab")])
def test_rejects_special_tokens(special_tokens):
    with pytest.raises(ValueError, match="special_tokens: expected"):
        Tokenizer([], special_tokens)
    with pytest.raises(TypeError, match="expected strings in a tuple"):
        Tokenizer([], "abc")
