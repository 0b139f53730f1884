"""One tolerance table for all tests: what a few roundings in each dtype cost."""

import torch

# About 8 units in the last place in half precision, 16 in float32, 12 digits in float64; as much
# absolute, for values near one.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 8e-3, "atol": 8e-3},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
}
