"""Grades exercises and explains what went wrong. It knows no chapter.

A grader (tests/exercises/test_STEM.py) declares exercises and their checks; a catalogue
(misconceptions/STEM.py) declares the wrong answers that people give. The engine runs the checks on
a student's functions, records every call, and replays the calls on the catalogue when one fails.
"""

from autograder import expect
from autograder.declarations import alternative, exercise, misconception, points

__all__ = ["alternative", "exercise", "expect", "misconception", "points"]
