"""How the report's plots look: on white, in colours that a colour-blind reader and a grey printer can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008), without the yellow, which is too light on white; and a grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GREY = "#1a1a1a", "#767676"
FONT = 10.0


def colour(number: int) -> str:
    """Of the series `number`, counted from 0."""
    return _COLOURS[number % len(_COLOURS)]


def line(number: int) -> str:
    """Line style of the series `number`."""
    return _LINES[number % len(_LINES)]


def marker(number: int) -> str:
    """Marker of the series `number`."""
    return _MARKERS[number % len(_MARKERS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def finish(axes: Axes, title: str = "") -> None:
    """Give axes the report's frame, grid and fonts."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT - 1)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(FONT)
    if title:
        axes.set_title(title, fontsize=FONT + 1, loc="left")


def panels(figure: Figure, count: int, columns: int, *, shared: bool = False) -> Sequence[Axes]:
    """`count` axes in rows of `columns`; `shared`: with the same ranges."""
    rows = -(-count // columns)
    grid = figure.subplots(rows, min(columns, count), squeeze=False, sharex=shared, sharey=shared).flatten().tolist()
    for axes in grid[count:]:
        figure.delaxes(axes)
    return grid[:count]
