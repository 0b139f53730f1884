import pytest

from reference.configuration import COUNT, FLAG, NOTHING, NUMBER, Keys, read_json

KEYS = Keys(
    file="model.json",
    honoured={"width": COUNT, "rate": NUMBER + NOTHING, "is_on": FLAG},
    plain={"kind": ("a", "b"), "bias": (False,)},
    harmless=frozenset({"note"}),
)


def test_reads_what_is_honoured_and_passes_over_what_says_nothing():
    entries = {"width": 3, "rate": None, "is_on": False, "kind": "b", "note": 5, "bias": None}
    nothing = {"new": None, "newer": {}, "newest": []}
    assert KEYS.read({**entries, **nothing}) == {"width": 3, "is_on": False}


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"other": False}, "model.json: other=False not known here; remove a key only if"),
        ({"other": 0, "more": "x"}, "other=0, more='x' not known here"),
        ({"width": True}, "width: expected int, got True"),
        ({"width": 2.0}, "width: expected int, got 2.0"),
        ({"width": None}, "width: expected int, got None"),
        ({"rate": "1e-3"}, "rate: expected int or float or null, got '1e-3'"),
        ({"is_on": 1}, "is_on: expected bool, got 1"),
        ({"kind": "c"}, "kind: expected 'a' or 'b', got 'c'"),
        ({"bias": True, "width": "w"}, "bias: expected False, got True; width: expected int"),
    ],
)
def test_rejects_by_name_and_value(entries, message):
    with pytest.raises(ValueError, match=message):
        KEYS.read(entries)


def test_rejects_a_key_that_stands_twice(tmp_path):
    (tmp_path / "model.json").write_text('{"width": 1, "width": 2}')
    with pytest.raises(ValueError, match="a key twice: width"):
        read_json(tmp_path / "model.json")
