"""Vocabularies of others, streams and special tokens. Oracle: the `tokenizers` library."""

import json
import random
import tracemalloc

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from reference.pretrained import corpus
from reference.transformer.tokenizer import END, Tokenizer, read_gpt2_files, read_tokenizer_json
from reference.transformer.tokenizer.cutting import GPT2, Cutter

TEXT = corpus()[:30_000]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "digits": Sequence([Digits(), ByteLevel(add_prefix_space=False)]),
    "llama3": Sequence(
        [
            Split(Regex(LLAMA3), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "string": Sequence([Split("a.b", "isolated"), ByteLevel(add_prefix_space=False)]),
}
ADDED = ["<|a|>", "<|a|><|b|>", "<｜ü▁x｜>"]  # noqa: RUF001
SAMPLES = [
    TEXT[5000:6000],
    "it's we'LL 12,345.6\n\n \t x  \r\n\r\ny  ",
    "naïve 東京 🙂\u0301 ١٢ Ⅷ a.b",
    f"{ADDED[0]}x{ADDED[1]} {ADDED[2]}{ADDED[0]}",
    "",
]


@pytest.fixture(scope="module", params=CUTS)
def pair(request, tmp_path_factory):
    """Theirs, and ours from its file."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=request.param == "llama3"))
    theirs.pre_tokenizer = CUTS[request.param]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    theirs.train_from_iterator([TEXT], trainer)
    theirs.add_special_tokens(ADDED[:2])
    theirs.add_tokens([tokenizers.AddedToken(ADDED[2], normalized=False)])
    path = tmp_path_factory.mktemp("files") / "tokenizer.json"
    theirs.save(str(path))
    return theirs, read_tokenizer_json(path)


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_matches_the_ids_of_tokenizers(pair, text):
    theirs, ours = pair
    assert ours.vocab_size == theirs.get_vocab_size()
    ids = theirs.encode(text).ids
    assert ours.encode(text, allow_special=True) == ids
    assert list(ours.encode_iterable([text], allow_special="all")) == ids
    assert ours.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab'sreLl \t\n\r12.!é東") | st.characters(codec="utf-8"), max_size=30)
)
def test_invariant_any_text_has_their_ids(pair, text):
    theirs, ours = pair
    # Letters that are younger than one side's Unicode are cut differently.
    if all(ord(letter) < 0x500 or 0x4E00 <= ord(letter) < 0x9FFF for letter in text):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_invariant_a_word_of_the_vocabulary_is_whole_with_ignore_merges():
    """Llama 3: a word that is a piece is that piece, also where no merges lead to it."""
    vocabulary = {i: bytes([i]) for i in range(256)} | {256: b"abc"}
    assert Tokenizer.from_vocabulary(vocabulary, []).encode("abc") == [97, 98, 99]
    whole = Tokenizer.from_vocabulary(vocabulary, [], ignore_merges=True)
    assert whole.encode("abc") == [256] and whole.encode("abcd") == [97, 98, 99, 100]


def test_matches_tokenizers_on_gpt2_files(tmp_path):
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=400, special_tokens=[END], show_progress=False)
    theirs.save_model(str(tmp_path))
    ours = read_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode(f"a{END}", allow_special=True)[-1] == theirs.token_to_id(END)
    # the tokens of a fine-tuned model, which its files do not name, come behind
    more = read_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt", (END, "<|im_start|>"))
    assert more.encode("<|im_start|>", allow_special="all") == [theirs.get_vocab_size()]


def test_invariant_a_given_vocabulary_gives_the_same_tokenizer(tmp_path):
    trained = Tokenizer.train(TEXT, vocab_size=400)
    merges = [(trained.pieces[left], trained.pieces[right]) for left, right in trained.merges]
    again = Tokenizer.from_vocabulary(dict(enumerate(trained.pieces)), merges, (END,))
    assert again.merges == trained.merges
    assert again.encode(TEXT[:3000]) == trained.encode(TEXT[:3000])
    assert again.encode(END, allow_special=[END]) == [0]
    with pytest.raises(ValueError, match="expected a vocabulary of Tokenizer.train"):
        again.save(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "patterns", [(GPT2,), (r"\p{N}", GPT2), (LLAMA3,)], ids=["gpt2", "d", "l3"]
)
def test_invariant_a_stream_is_cut_as_the_whole(patterns, monkeypatch):
    monkeypatch.setattr("reference.transformer.tokenizer.cutting.READ_AHEAD", 1)
    letters = [
        "a",
        "B",
        "'",
        "s",
        "r",
        "e",
        "l",
        " ",
        "  ",
        "\n",
        "\r\n",
        "7",
        "!",
        "é",
        "東",
        "\t",
    ]
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choices(letters, k=rng.randint(0, 60)))
        chunks, start = [], 0
        while start < len(text):
            end = start + rng.randint(1, 5)
            chunks.append(text[start:end])
            start = end
        cutter = Cutter(patterns)
        assert list(cutter.cut_stream(chunks)) == cutter.cut(text), text


def test_invariant_special_tokens_may_straddle_the_chunks(monkeypatch):
    monkeypatch.setattr("reference.transformer.tokenizer.cutting.READ_AHEAD", 1)
    specials = ("<|a|>", "<|a|><|b|>", "ab", "abX")
    tokenizer = Tokenizer.train(TEXT, vocab_size=300, special_tokens=specials)
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(
            rng.choices([*specials, "a", "<", "<|", " ", "x1", "\n"], k=rng.randint(0, 12))
        )
        cut = [text[i : i + 3] for i in range(0, len(text), 3)]
        for allowed in (True, ["ab", "abX"], False):
            expected = tokenizer.encode(text, allow_special=allowed)
            assert list(tokenizer.encode_iterable(cut, allow_special=allowed)) == expected


def test_invariant_a_stream_of_new_words_takes_little_memory(monkeypatch):
    """tokenizers#1539, gpt-neox#383: a cache of words without a bound is a leak.

    30,000 words that never come again, of which an unbounded one keeps about 10 MB.
    """
    monkeypatch.setattr("reference.transformer.tokenizer.bpe.REMEMBERED_WORDS", 1000)
    tokenizer = Tokenizer([])
    lines = (f"word{i * 7919:x} q{i:x}\n" for i in range(15_000))
    tracemalloc.start()
    count = sum(1 for _ in tokenizer.encode_iterable(lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 200_000 and peak < 4e6 and len(tokenizer._words) <= 1000


def test_invariant_long_words_are_not_remembered():
    tokenizer = Tokenizer([])
    tokenizer.encode("x" * 1000 + " " + "y" * 20)
    assert list(tokenizer._words) == [" " + "y" * 20]


def test_rejects_disallowed_special_tokens():
    """tiktoken's default: what a user writes should not pass for the end of his text."""
    tokenizer = Tokenizer([], ("<|a|>", "<|b|>"))
    text = "x<|a|>y"
    with pytest.raises(
        ValueError, match=r"expected no special token, got '<\|a\|>'; allow_special"
    ):
        tokenizer.encode(text, disallow_special="all")
    assert 0 not in tokenizer.encode(text, disallow_special=["<|b|>"])
    assert 0 in tokenizer.encode(text, allow_special=["<|a|>"], disallow_special="all")
    with pytest.raises(ValueError, match="expected special tokens of"):
        tokenizer.encode(text, allow_special=["<|c|>"])
    with pytest.raises(ValueError, match="expected special tokens of"):
        tokenizer.encode(text, allow_special="<|a|>")


def test_invariant_surrogates_are_repaired_as_in_tiktoken():
    """tiktoken#82, tiktoken#541: a pair is its character, and a lone one is U+FFFD."""
    for tokenizer in (Tokenizer([]), Tokenizer.train("a\ud83d b \ud83d\udc4d" * 3, vocab_size=270)):
        assert tokenizer.encode("a\ud83d\udc4d") == tokenizer.encode("a\U0001f44d")
        assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a\ufffdb"
        assert list(tokenizer.encode_iterable(["a\udc80"])) == tokenizer.encode("a\ufffd")


def test_invariant_special_tokens_can_be_cut_in_training():
    """By default they are text, and their letters merge as in `tokenizers`."""
    text = f"ab{END}cd" * 50
    assert b"<|" in Tokenizer.train(text, vocab_size=270).pieces
    cut = Tokenizer.train(text, vocab_size=270, cut_special=True)
    assert cut.pieces[257:] == [b"ab", b"cd", b"cdab"]


def test_invariant_ties_go_to_the_smallest_ids():
    """ "ba" and "ab" as often: "a" has the smaller id, so that its pair is first."""
    pieces = Tokenizer.train("ba ba ab ab", vocab_size=260).pieces
    assert pieces[257] == b"ab"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer: expected none"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding: expected none"),
        ({"pre_tokenizer": None}, "pre_tokenizer: expected ByteLevel at its end"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer: expected ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"model": {"type": "Unigram"}}, "expected a model of type BPE, got 'Unigram'"),
        ({"model.dropout": 0.1}, "model.dropout: expected none, got 0.1"),
        ({"model.end_of_word_suffix": "</w>"}, "model.end_of_word_suffix: expected none"),
        ({"model.merges": [["a", "zz"]]}, "merges: expected pieces of the vocabulary, got b'zz'"),
        ({"model.merges": ["a b c"]}, "merges: expected two pieces"),
        ({"model.vocab": {"a": 0}}, "expected all 256 bytes as pieces"),
        ({"model.vocab": {"a": 0, "b": 3}}, "expected ids from 0 to 1 without a gap"),
        ({"model.vocab": {"\u2581the": 0}}, "expected pieces in GPT-2's alphabet"),
        (
            {"added_tokens": [{"content": "<x>", "id": 256, "lstrip": True}]},
            "lstrip of the added token '<x>': expected none",
        ),
    ],
    ids=str,
)
def test_rejects_what_it_does_not_do(change, message, tmp_path):
    content = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [],
        "model": {
            "vocab": {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))},
            "merges": [],
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert read_tokenizer_json(path).decode(read_tokenizer_json(path).encode("aé")) == "aé"
    for name, value in change.items():
        place, _, key = name.rpartition(".")
        (content[place] if place else content)[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_tokenizer_json(path)
