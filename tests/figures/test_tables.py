"""A table as text."""

import pytest

from figures.tables import table


def test_first_column_left_the_others_right_and_four_digits(capsys):
    table(("", "loss", "n"), ("short", 1.23456, 7), ("a longer name", 0.5, 12345))
    assert capsys.readouterr().out.splitlines() == [
        "                loss      n",
        "-------------  -----  -----",
        "short          1.235      7",
        "a longer name    0.5  12345",
    ]


def test_rejects_rows_of_different_lengths():
    with pytest.raises(ValueError, match=r"as many columns in each, got \[1, 2\]"):
        table(("a", "b"), ("c",))
