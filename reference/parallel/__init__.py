"""Training on many devices.

ranks           the simulated machine: one program on N ranks, and the same on real processes
data_parallel   other rows on each rank: all-reduce, DDP, restarts
zero            the same, with each rank holding a part: ZeRO and FSDP
tensor          a part of every matrix on each rank; sequence parallelism
context         some of the positions on each rank: Ulysses, ring attention
pipeline        some of the layers on each rank; recomputation, 3D groups
"""
