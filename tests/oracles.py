"""Production systems outside of the environment, each for a process of its own: `make oracles`."""

import sys
import warnings

import pytest

from tools.fetch_oracles import ORACLES, Oracle


def needs(oracle: Oracle):
    """Mark a test that compares with this system."""
    return pytest.mark.skipif(
        not (ORACLES / oracle.folder).is_dir(),
        reason=f"{oracle.folder} is not in .cache/oracles; run `make oracles`, which says why",
    )


def enter(oracle: Oracle) -> str:
    """Let this process, a forked rank, import the system; its folder. Its warnings are its own."""
    folder = str(ORACLES / oracle.folder)
    sys.path.append(folder)
    warnings.simplefilter("ignore")
    return folder
