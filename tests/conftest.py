"""What must be settled before any test imports Triton, and an oracle that lives apart."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ORACLES = Path(__file__).parent.parent / ".cache" / "oracles"


@pytest.fixture(scope="session")
def torchao():
    """torchao, kept out of the environment: where transformers finds it, each import of it takes
    seconds longer and prints warnings. `make oracles` installs it."""
    if not (ORACLES / "torchao").is_dir():
        pytest.fail(f"torchao is not in {ORACLES}; run `make oracles`")
    sys.path.append(str(ORACLES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao
    finally:
        sys.path.remove(str(ORACLES))
    return torchao
