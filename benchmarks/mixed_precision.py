"""The recipe's parts in Python beside torch's in C++: what the plain version costs.

An AdamW step with loss scaling beside GradScaler's, and a block under both autocasts, on an MLP of
SmolLM2's widths (576, 1536).
"""

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, compare
from reference.mixed_precision import CPU, Autocast, LossScaler

NUM_TOKENS, DIM, HIDDEN = 128, 576, 1536


def rows() -> list[Row]:
    return [*_scaled_step(), *_autocast()]


def _block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(DIM), nn.Linear(DIM, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, DIM)
    )


def _scaled_step() -> list[Row]:
    x = torch.randn(NUM_TOKENS, DIM)

    def step(scaler: LossScaler | torch.amp.GradScaler) -> Tensor:
        block = blocks[type(scaler)]
        optimizer = optimizers[type(scaler)]
        with torch.enable_grad():
            scaler.scale(block(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return x

    scalers = LossScaler(), torch.amp.GradScaler("cpu")
    blocks = {type(s): _block() for s in scalers}
    optimizers = {kind: torch.optim.AdamW(block.parameters()) for kind, block in blocks.items()}
    ours, theirs = (lambda s=s: step(s) for s in scalers)
    return compare("training step with loss scaling", ours, theirs)


def _autocast() -> list[Row]:
    x, block = torch.randn(NUM_TOKENS, DIM), _block()

    def ours() -> Tensor:
        with Autocast(torch.bfloat16, policy=CPU):
            return block(x)

    def theirs() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    return compare("autocast to bfloat16", ours, theirs, list(block.parameters()))
