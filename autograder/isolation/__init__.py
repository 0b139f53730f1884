"""Runs answers in confined processes that the grader talks to in plain values."""
