"""What composes with what: every technique with every feature, against one rank by plain torch.

A cell's outcome is held against docs/composition.json, of which the site makes a page;
`python -m tools.composition` writes it anew. THOROUGH=1 adds more ranks, seeds and real processes.
"""

import itertools
import json
import os
from pathlib import Path

import pytest

from reference.parallel.data_parallel import DDP
from reference.parallel.ranks import run
from tests.reference.parallel.composition import workload
from tests.reference.parallel.composition.cells import FEATURES, TECHNIQUES, outcome

RECORDED = json.loads((Path(__file__).parents[4] / "docs" / "composition.json").read_text())
CELLS = [pytest.param(t, f, id=f"{t.name}, {f.name}") for t in TECHNIQUES for f in FEATURES]
# Seed, transport, and whether with more ranks.
VARIANTS = [(workload.SEED, "simulated", False)]
if os.environ.get("THOROUGH"):
    VARIANTS += itertools.product((1, 2), ("simulated", "processes"), (False, True))


@pytest.mark.slow
@pytest.mark.parametrize("seed, backend, is_wide", VARIANTS)
@pytest.mark.parametrize("technique, feature", CELLS)
def test_matches_one_rank_or_is_refused_by_name(
    technique, feature, seed, backend, is_wide, monkeypatch
):
    monkeypatch.setattr(workload, "SEED", seed)
    found = outcome(technique, feature, backend=backend, is_wide=is_wide)
    assert found == RECORDED[technique.name][feature.name], (
        "docs/composition.json is stale: python -m tools.composition"
    )


def test_no_cell_is_left_out():
    names = {f.name for f in FEATURES}
    assert len(names) == len(FEATURES)
    assert RECORDED.keys() == {t.name for t in TECHNIQUES}
    assert all(row.keys() == names for row in RECORDED.values())


def test_rejects_an_unused_parameter_that_ddp_was_not_told_of():
    def program(comm):
        DDP(workload.probed(), comm)(workload.texts(0, False)[0]).sum().backward()

    with pytest.raises(RuntimeError, match="without a gradient of norm.spare"):
        run(2, program, is_measured=False)
