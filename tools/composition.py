"""`python -m tools.composition`: run every cell of the composition matrix, and keep the outcomes.

They go to docs/composition.json, of which `make site` makes the page "What composes with what". A
cell that neither equals one rank nor is refused by name stops it.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "composition.json"
HEAD = """# What composes with what

Each technique with each feature, a small Llama through two steps of AdamW, on simulated ranks. This
table is made from the outcomes of a test, `tests/reference/parallel/composition`, which runs each
cell, in CI as well.

**equal**: as one rank that trains on the whole batch: the loss, every gradient (also which are
`None`), every parameter and buffer afterwards, names, dtypes, `requires_grad`, and which names are
one parameter. **refused**: an error that says what to do in place of it; nothing wrong is computed.
**property**: no run on one rank is the same, so something else is tested. Numbers lead to the
reason below.

"""


def main() -> int:
    from tests.reference.parallel.composition.cells import all_outcomes

    RECORD.write_text(json.dumps(all_outcomes(), indent=1) + "\n")
    print(RECORD.relative_to(ROOT))
    return 0


def page(record: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a table of features by techniques, and a numbered sentence for each reason."""
    reasons: list[str] = []
    rows = ["| | " + " | ".join(record) + " |", "|---|" + "---|" * len(record)]
    for feature in next(iter(record.values())):
        cells = [_cell(record[technique][feature], reasons) for technique in record]
        rows.append(f"| {feature} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return HEAD + "\n".join([*rows, "", "## Why", "", *notes, ""])


def _cell(found: dict[str, Any], reasons: list[str]) -> str:
    if not found["why"]:
        return str(found["outcome"])
    if found["why"] not in reasons:
        reasons.append(found["why"])
    return f"{found['outcome']} ({reasons.index(found['why']) + 1})"


if __name__ == "__main__":
    sys.exit(main())
