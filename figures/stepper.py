"""A process to step through: a slider in a live notebook, a film strip everywhere else."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase


class Stepper:
    """Shows `frames` one at a time, each drawn by `draw(figure, frame)`.

    The last expression of a cell, it sends both forms: front ends with a kernel show the slider;
    GitHub, slides and printed pages show the strip of the frames whose indices are in `strip`
    (by default four, evenly spread, first and last among them).

        def draw(figure, frame):
            ax = figure.subplots()
            ax.bar(range(4), frame)

        Stepper(frames, draw)
    """

    def __init__(
        self,
        frames: Sequence[Any],
        draw: Callable[[FigureBase, Any], object],
        *,
        strip: Sequence[int] | None = None,
        columns: int = 2,
        size: tuple[float, float] = (5.0, 3.2),
    ) -> None:
        if not len(frames):
            raise ValueError("frames: expected at least one, got none")
        self.frames, self.draw, self.size = frames, draw, size
        self.strip = _spread(len(frames), 4) if strip is None else list(strip)
        for index in self.strip:
            if not 0 <= index < len(frames):
                raise ValueError(f"strip: expected 0 to {len(frames) - 1}, got {index}")
        self.columns = min(columns, len(self.strip))

    def __repr__(self) -> str:
        return f"Stepper of {len(self.frames)} steps"

    def png(self, index: int) -> bytes:
        """One frame."""
        figure = Figure(figsize=self.size, layout="constrained")
        self._draw(figure, index)
        return _png(figure)

    def strip_png(self) -> bytes:
        """The film strip."""
        rows = -(-len(self.strip) // self.columns)
        width, height = self.size
        figure = Figure(figsize=(width * self.columns, height * rows), layout="constrained")
        panels = figure.subfigures(rows, self.columns, squeeze=False).flat
        for panel, index in zip(panels, self.strip, strict=False):
            self._draw(panel, index)
        return _png(figure)

    def widget(self) -> Any:
        """The slider, with a button that plays the frames."""
        import ipywidgets

        last = len(self.frames) - 1
        slider = ipywidgets.IntSlider(min=0, max=last, description="step", readout=False)
        play = ipywidgets.Play(min=0, max=last, interval=900)
        ipywidgets.jslink((play, "value"), (slider, "value"))
        image = ipywidgets.Image(value=self.png(0), format="png")

        def show(change: dict) -> None:
            image.value = self.png(change["new"])

        slider.observe(show, names="value")
        return ipywidgets.VBox([ipywidgets.HBox([play, slider]), image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        view = self.widget()._repr_mimebundle_() or {}
        return {**view, "image/png": self.strip_png(), "text/plain": repr(self)}

    def _draw(self, figure: FigureBase, index: int) -> None:
        figure.suptitle(f"step {index + 1} of {len(self.frames)}", x=0.01, ha="left", fontsize=12)
        self.draw(figure, self.frames[index])


def _spread(count: int, chosen: int) -> list[int]:
    last = min(count, chosen) - 1
    return [round(i * (count - 1) / max(last, 1)) for i in range(last + 1)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
