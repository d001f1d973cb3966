"""Small plots of how training went, a panel for each quantity and a line for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from router_replay.report import style
from router_replay.report.dynamics import FEW_STEPS, Curve, Quantity, RunDynamics, shown, smooth

_COLUMNS, _KEY_COLUMNS = 3, 5
_DOTS = (0, (1, 1.5))


def dynamics_over_steps(runs: Sequence[RunDynamics]) -> Figure:
    """A panel for each quantity that `shown`, on the steps of all runs; runs of one name have one colour."""
    quantities = shown(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    keys = _keys(runs, names)
    rows, key_rows = -(-len(quantities) // _COLUMNS), -(-len(keys) // _KEY_COLUMNS)
    figure = style.new_figure(10, 2.2 * rows + 0.25 * key_rows + 0.3)
    drawn = style.panels(figure, len(quantities), _COLUMNS)
    steps = [step for run in runs for curve in run.curves.values() for step in curve]
    margin = max(0.02 * (max(steps) - min(steps)), 0.5)
    for number, (axes, quantity) in enumerate(zip(drawn, quantities, strict=True)):
        _draw(axes, quantity, runs, names)
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if number + _COLUMNS >= len(quantities):
            axes.set_xlabel("step")
    if keys:
        figure.legend(handles=keys, loc="outside upper center", ncols=_KEY_COLUMNS, frameon=False,
                      fontsize=style.FONT - 1)  # fmt: skip
    return figure


def _draw(axes: Axes, quantity: Quantity, runs: Sequence[RunDynamics], names: Sequence[str]) -> None:
    for run in runs:
        number, curve = names.index(run.name), run.curves.get(quantity.name, {})
        look: dict[str, Any] = {"color": style.colour(number), "linestyle": style.line(number)}
        if len(curve) > FEW_STEPS:
            _line(axes, curve, linewidth=0.6, alpha=0.35, color=look["color"])
            _line(axes, smooth(curve), linewidth=1.5, **look)
        else:
            # A line does not say where its few values are, and a single one has no line.
            _line(axes, curve, linewidth=1.3, marker="o", markersize=3, **look)
    _scale(axes, quantity, [value for run in runs for value in run.curves.get(quantity.name, {}).values()])
    for run in runs:
        colour = style.colour(names.index(run.name))
        if run.collapse is not None:
            axes.axvline(run.collapse, color=colour, linewidth=1.2, linestyle=_DOTS, zorder=1)
        lost = [step for step, value in run.curves.get(quantity.name, {}).items() if not math.isfinite(value)]
        if lost:
            # At the upper edge: of what is infinite or no number there is no height.
            axes.plot(lost, [1.0] * len(lost), transform=axes.get_xaxis_transform(), linestyle="", marker="x",
                      markersize=6, color=colour, clip_on=False).pop().set_in_layout(False)  # fmt: skip
    style.finish(axes, quantity.title)
    axes.set_ylabel(quantity.label)
    axes.tick_params(labelsize=style.FONT - 2)


def _line(axes: Axes, curve: Curve, **look: Any) -> None:
    axes.plot(list(curve), [value if math.isfinite(value) else math.nan for value in curve.values()], **look)


def _scale(axes: Axes, quantity: Quantity, values: Sequence[float]) -> None:
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if quantity.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif quantity.logarithmic and positive:
        if len(positive) == sum(map(math.isfinite, values)):
            axes.set_yscale("log")
        else:
            # A value of 0 has no logarithm, and its place below the others.
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(bottom=0)


def _keys(runs: Sequence[RunDynamics], names: Sequence[str]) -> list[Line2D]:
    """What the figure's legend explains: runs, where there are several, and marks."""
    keys = []
    if len(runs) > 1:
        for number, name in enumerate(names):
            count = sum(run.name == name for run in runs)
            label = name if count == 1 else f"{name} ({count} runs)"
            look: dict[str, Any] = {"color": style.colour(number), "linestyle": style.line(number)}
            keys.append(Line2D([], [], label=label, **look))
    if any(run.collapse is not None for run in runs):
        keys.append(Line2D([], [], color=style.GREY, linewidth=1, linestyle=_DOTS, label="collapse"))
    if any(not math.isfinite(value) for run in runs for curve in run.curves.values() for value in curve.values()):
        keys.append(Line2D([], [], color=style.GREY, linestyle="", marker="x", label="not finite"))
    return keys
