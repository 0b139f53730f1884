"""The style: colours that differ for every eye, and labels that do not touch."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from figures import style

# Brettel-type simulation matrices on linear RGB (Machado et al. 2009, severity 1).
MACHADO = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.fixture(autouse=True)
def styled():
    with mpl.rc_context():
        mpl.use("agg")
        style.use()
        yield
        plt.close("all")


@pytest.mark.parametrize("eye", MACHADO)
def test_colours_differ_for_every_eye(eye):
    def seen(colour: str) -> np.ndarray:
        rgb = np.array(mpl.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return lab(np.clip(np.array(MACHADO[eye]) @ linear, 0, 1))

    for one, other in itertools.combinations(style.COLOURS.values(), 2):
        assert np.linalg.norm(seen(one) - seen(other)) > 10, (one, other)


def lab(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB to CIELAB, D65."""
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / np.array([0.9505, 1.0, 1.089])
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("ends", [[1, 1, 1, 1], [0, 5, 5.1, 10], [10, 9.9, 9.8], [3]])
def test_labels_do_not_touch(ends):
    figure, ax = plt.subplots()
    for i, end in enumerate(ends):
        ax.plot([0, 1], [0, end], label=f"line {i}")
    ax.set_ylim(0, 11)
    style.label_lines(ax)
    figure.draw_without_rendering()
    boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == len(ends)
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0


def test_labels_have_their_lines_colours_and_order():
    _, ax = plt.subplots()
    for end, name in ((2.0, "high"), (1.0, "low")):
        ax.plot([0, 1], [0, end], label=name)
    style.label_lines(ax)
    low, high = ax.texts
    assert (low.get_text(), high.get_text()) == ("low", "high")
    assert [t.get_color() for t in (low, high)] == [
        style.COLOURS["vermilion"],
        style.COLOURS["blue"],
    ]


def test_labels_keep_to_a_logarithmic_axis():
    figure, ax = plt.subplots()
    ax.plot([1, 10], [1, 1e6], label="far")
    ax.set_yscale("log")
    style.label_lines(ax)
    figure.draw_without_rendering()
    box = ax.texts[0].get_window_extent()
    assert abs((box.y0 + box.y1) / 2 - ax.transData.transform((10, 1e6))[1]) < 3


def test_labels_the_last_finite_point():
    _, ax = plt.subplots()
    ax.plot([0, 1, 2], [1, 2, float("nan")], label="diverges")
    style.label_lines(ax)
    assert tuple(ax.texts[0].xy) == (1, 2)


def test_rejects_axes_without_labels():
    _, ax = plt.subplots()
    ax.plot([0, 1])
    with pytest.raises(ValueError, match="no labelled lines"):
        style.label_lines(ax)
