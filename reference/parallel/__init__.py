"""Training on many devices.

ranks   the simulated machine: one program on N ranks, with ledgers, and the same on real processes
"""
