"""Grades chapter 00: start here."""

import torch

from autograder import exercise, expect, points


def batch(lengths, rng, *, num_positions=12, dim=6, dtype=torch.float32):
    """Random hidden states with an offset, and which positions are real (padded on the right)."""
    hidden = torch.randn(len(lengths), num_positions, dim, generator=rng) * 2 + 1.5
    is_real = torch.arange(num_positions) < torch.tensor(lengths)[:, None]
    return hidden.to(dtype), is_real


def mean_of_rows(hidden, is_real):
    """The oracle: the real rows of each sentence, picked out and averaged in float64."""
    rows = [vectors[real].double().mean(0) for vectors, real in zip(hidden, is_real, strict=True)]
    return torch.stack(rows).to(hidden.dtype)


@exercise(
    "mean_pool",
    kind="build",
    minutes=5,
    difficulty=1,
    see="4. What an exercise asks",
    hints=(
        "Which of the three dimensions has to disappear, and by which number, one per sentence, "
        "do you divide?",
        "A message about sizes that do not match: is_real is (B, T) and hidden is (B, T, D), so "
        "one of them lacks a dimension at the end (is_real[..., None]). A nan in the output: look "
        "at what 0 * nan and 0 / 0 give.",
        "widen hidden to float32; replace the vectors at padding by 0; add over the tokens; divide "
        "by the number of real tokens, at least 1; return in the first dtype.",
    ),
)
class TestMeanPool:
    @points(1)
    def test_without_padding(self, student, rng):
        """is the plain mean where no position is padding"""
        hidden, is_real = batch([12, 12, 12], rng)
        expect.close(student.mean_pool(hidden, is_real), hidden.mean(1))

    @points(2)
    def test_with_padding(self, student, rng):
        """averages over the real tokens of each sentence"""
        hidden, is_real = batch([3, 12, 1, 7], rng)
        expect.close(student.mean_pool(hidden, is_real), mean_of_rows(hidden, is_real))

    @points(1)
    def test_padding_anywhere(self, student, rng):
        """takes padding on the left and in the middle"""
        hidden, _ = batch([12, 12], rng)
        is_real = torch.tensor([[0] * 9 + [1] * 3, [1, 0] * 6]).bool()
        expect.close(student.mean_pool(hidden, is_real), mean_of_rows(hidden, is_real))

    @points(2)
    def test_anything_in_padding(self, student, rng):
        """ignores nan and inf at padding"""
        hidden, is_real = batch([4, 9], rng)
        expected = mean_of_rows(hidden, is_real)
        hidden[0, 5], hidden[1, 10] = float("nan"), float("inf")
        expect.close(student.mean_pool(hidden, is_real), expected)

    @points(1)
    def test_no_tokens(self, student, rng):
        """gives zeros for a sentence without tokens"""
        hidden, is_real = batch([0, 5], rng)
        expected = torch.cat([torch.zeros(1, 6), mean_of_rows(hidden[1:], is_real[1:])])
        expect.close(student.mean_pool(hidden, is_real), expected)

    @points(2)
    def test_dtypes(self, student, rng):
        """keeps float16, bfloat16 and float64, and does not overflow"""
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            hidden, is_real = batch([150, 200], rng, num_positions=200, dtype=dtype)
            out = student.mean_pool(hidden * 400, is_real)
            expect.close(out, mean_of_rows(hidden * 400, is_real), f"the {dtype} output")
