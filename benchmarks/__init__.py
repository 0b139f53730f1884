"""Ours beside the production kernel: ratios, measured in one process, interleaved."""
