"""The stepper: what it sends to a front end, and that the same frames give the same bytes."""

import io

import matplotlib.image
import numpy as np
import pytest

from figures.stepper import Stepper


def bars(figure, frame):
    ax = figure.subplots()
    ax.bar(range(len(frame)), frame)
    ax.set(ylim=(0, 10), xlabel="rank", ylabel="value")


FRAMES = [[i, 9 - i, i] for i in range(9)]


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_bundle_has_the_widget_and_the_strip():
    bundle = Stepper(FRAMES, bars)._repr_mimebundle_()
    assert set(bundle) == {
        "application/vnd.jupyter.widget-view+json", "image/png", "text/plain",
    }  # fmt: skip
    assert bundle["text/plain"] == "Stepper of 9 steps"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 3, 5, 8]), (100, [0, 33, 66, 99])],
)
def test_strip_spreads_from_first_to_last(count, expected):
    assert Stepper([[1]] * count, bars).strip == expected


def test_strip_shows_the_chosen_frames_in_order():
    drawn = []
    stepper = Stepper(FRAMES, lambda figure, frame: drawn.append(frame), strip=[7, 2])
    stepper.strip_png()
    assert drawn == [FRAMES[7], FRAMES[2]]


def test_strip_has_the_size_of_its_panels():
    one = pixels(Stepper(FRAMES, bars, strip=[0, 1, 2], size=(4, 3)).strip_png())
    assert one.shape[:2] == (600, 800)
    one = pixels(Stepper(FRAMES, bars, strip=[0, 1, 2], columns=3, size=(4, 3)).strip_png())
    assert one.shape[:2] == (300, 1200)


def test_same_frames_give_the_same_bytes():
    assert Stepper(FRAMES, bars).strip_png() == Stepper(FRAMES, bars).strip_png()


def test_slider_shows_the_frame_it_points_at():
    stepper = Stepper(FRAMES, bars)
    row, image = stepper.widget().children
    play, slider = row.children
    assert (slider.min, slider.max, play.max) == (0, 8, 8)
    slider.value = 5
    assert image.value == stepper.png(5) != stepper.png(0)


def test_rejects_no_frames_and_strips_outside():
    with pytest.raises(ValueError, match="frames: expected at least one"):
        Stepper([], bars)
    with pytest.raises(ValueError, match="strip: expected 0 to 8, got 9"):
        Stepper(FRAMES, bars, strip=[0, 9])


def test_leaves_no_pyplot_figure_open():
    import matplotlib.pyplot as plt

    Stepper(FRAMES, bars).strip_png()
    assert plt.get_fignums() == []
