"""Pictures of a run: what is drawn is what the ledgers hold."""

import matplotlib.pyplot as plt
import pytest
import torch

from figures.memory import memory
from figures.scale import scaled
from figures.timeline import timeline
from figures.traffic import traffic
from reference.parallel.ranks import CLASSROOM, run


def program(comm):
    weight = torch.ones(64, 64)
    with comm.region("matmul"):
        handle = comm.all_reduce(torch.ones(4096), async_op=True)
        product = weight @ weight
    handle.wait()
    return product.sum().item()


@pytest.fixture(scope="module")
def trace():
    return run(3, program, hardware=CLASSROOM).trace


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize(
    ("largest", "unit", "expected"),
    [(3.1e-5, "s", (1e6, "µs")), (2.0, "s", (1, "s")), (5e4, "B", (1e-3, "kB")),
     (0.5, "B", (1, "B")), (0.0, "s", (1, "s"))],
)  # fmt: skip
def test_scale(largest, unit, expected):
    factor, name = scaled(largest, unit)
    assert factor == pytest.approx(expected[0])
    assert name == expected[1]


def test_timeline_has_a_bar_for_each_event(ax, trace):
    timeline(ax, trace)
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    events = [(e.start_seconds, e.end_seconds - e.start_seconds) for e in trace.timeline()]
    factor = scaled(trace.seconds, "s")[0]
    torch.testing.assert_close(bars, [tuple(factor * x for x in e) for e in events])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:3] == ["rank 0 compute", "communication", "rank 1 compute"]


def test_timeline_of_one_stream(ax, trace):
    timeline(ax, trace, ranks=[1], streams=["compute"], seconds=1e-3)
    assert len(ax.patches) == len(trace.timeline(rank=1, stream="compute"))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 1"]
    assert ax.get_xlim() == (0, pytest.approx(1))


def test_memory_areas_reach_the_peak(ax, trace):
    memory(ax, trace)
    most = max(sum(held.values()) for _, held in trace.memory_samples(0))
    top = max(area.get_paths()[0].vertices[:, 1].max() for area in ax.collections)
    assert top == pytest.approx(most * scaled(most, "B")[0])


def test_traffic_writes_what_is_sent(ax, trace):
    traffic(ax, trace)
    assert ax.images[0].get_array().shape == (3, 3)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    # A ring of three: 2 * 2/3 of 16,384 bytes, each to its neighbour.
    assert written == {(1, 0): "21.8", (2, 1): "21.8", (0, 2): "21.8"}


def test_rejects_what_has_nothing_to_draw(ax):
    silent = run(2, lambda comm: None).trace
    for draw in (timeline, memory, traffic):
        with pytest.raises(ValueError, match="trace: no"):
            draw(ax, silent)
