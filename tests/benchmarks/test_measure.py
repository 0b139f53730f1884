import json
import math

import pytest
import torch
from torch import nn

from benchmarks import measure
from benchmarks.measure import Row, compare, peak_bytes, saved_bytes, time_in_turns, write


def test_a_ratio_is_ours_over_theirs():
    assert Row("x", 3.0, 2.0, "us").ratio == 1.5
    assert math.isnan(Row("x", 3.0, 0.0, "us").ratio)


def test_peak_bytes_counts_what_lives_at_one_time():
    assert peak_bytes(lambda: torch.empty(1000)) == 4000

    def one_after_the_other():
        for _ in range(5):
            torch.zeros(1000)

    assert peak_bytes(one_after_the_other) == 4000
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(5)]) == 20_000


def test_views_and_operations_in_place_are_free():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x.view(10, 100).T.add_(1)) == 0


def test_saved_bytes_counts_what_backward_needs():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x * 2) == 0
    assert saved_bytes(lambda: x.exp()) == 4000
    assert saved_bytes(lambda: x * x) == 4000  # one storage, saved twice


def test_time_in_turns_gives_one_number_a_call(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-4)
    calls = []
    times = time_in_turns(lambda: calls.append("a"), lambda: calls.append("b"))
    assert len(times) == 2 and all(t > 0 for t in times)
    assert {"a", "b"} == set(calls)


def test_compare_names_what_it_measured(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-4)
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    plain = compare("linear", lambda: layer(x), lambda: layer(x))
    assert [row.what for row in plain] == ["linear: forward", "linear: peak memory"]
    rows = compare("linear", lambda: layer(x), lambda: layer(x), list(layer.parameters()))
    assert [row.what.removeprefix("linear: ") for row in rows] == [
        "forward",
        "backward",
        "kept for backward",
        "peak memory",
    ]
    assert rows[2].ratio == rows[3].ratio == 1


def test_results_name_the_machine(tmp_path):
    path = write("topic", [Row("x", 3.0, 2.0, "us")], tmp_path / "results")
    content = json.loads(path.read_text())
    assert content["rows"] == [
        {"what": "x", "ours": 3.0, "theirs": 2.0, "unit": "us", "ratio": 1.5}
    ]
    assert content["machine"]["torch"] == torch.__version__


def test_what_fails_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
