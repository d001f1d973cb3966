"""The pictures of docs/stability.md: how training went in each arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from router_replay.files import write_whole
from router_replay.run.collapse import window_means
from studies.stability.protocol import FIRST, LATER, Arm
from studies.stability.results import RESULTS, Result, finished

_PANELS: tuple[tuple[str, bool, Callable[[Result], Sequence[float | None]]], ...] = (
    ("reward, mean of five steps", False, lambda result: window_means(result.series("reward"))),
    ("entropy, nats a token", False, lambda result: result.series("entropy")),
    ("norm of the gradient", True, lambda result: result.series("gradient_norm")),
    ("k3, nats a token", True, lambda result: result.series("k3")),
    ("tokens of a response", False, lambda result: result.series("response_tokens")),
)

_SMALLEST = 1e-6
"""What a logarithmic axis begins with: the controls' k3 is rounding, and some steps have no gradient."""

PICTURES: dict[str, Sequence[Arm]] = {"stability.png": FIRST, "stability-others.png": (FIRST[0], *LATER)}
"""Which arms are drawn into which file; the control into both, as all are read beside it."""


def draw(path: Path, arms: Sequence[Arm], folder: Path = RESULTS) -> None:
    """Write a PNG: score on held-out problems and five figures over the steps, a line for each arm that has a result.

    A line is the median over an arm's runs; what lies between all of them is shaded. A cross is where a run collapsed.
    """
    found = {arm.name: [each for each in finished(arm, folder) if each.steps] for arm in arms}
    found = {name: runs for name, runs in found.items() if runs}
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    first, *others = figure.subplots(2, 3).flat
    first.set_title("score on held-out problems", fontsize=10)
    for axes, (title, logarithmic, _) in zip(others, _PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        if logarithmic:
            axes.set_yscale("log")
    for number, (name, runs) in enumerate(found.items()):
        colour = f"C{number}"
        steps = sorted(set.intersection(*(set(each.evaluations) for each in runs)))
        _line(
            first, steps, [[each.evaluations[step] for step in steps] for each in runs], colour, f"{name} ({len(runs)})"
        )
        for axes, (_, logarithmic, series) in zip(others, _PANELS, strict=True):
            lines = [series(each) for each in runs]
            steps = list(range(1, min(map(len, lines)) + 1))
            _line(axes, steps, [[_shown(line[step - 1], logarithmic) for step in steps] for line in lines], colour)
        for each in runs:
            if each.collapse is not None:
                others[0].plot(each.collapse, window_means(each.series("reward"))[each.collapse - 1], "x", color=colour)
    for axes in (first, *others):
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    # Two lines, where one would be wider than the picture.
    columns = len(found) if len(found) <= 5 else math.ceil(len(found) / 2)
    figure.legend(loc="outside lower center", ncols=max(columns, 1), fontsize=9, frameon=False)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def _shown(value: float | None, logarithmic: bool) -> float:
    """NaN, of which nothing is drawn, for what is not known, and where a logarithm would show how far away 0 is."""
    return math.nan if value is None or (logarithmic and value < _SMALLEST) else value


def _line(axes: Axes, steps: Sequence[int], lines: Sequence[Sequence[float]], colour: str, label: str = "") -> None:
    at_steps = list(zip(*lines, strict=True))
    axes.plot(
        steps, [statistics.median(values) for values in at_steps], color=colour, label=label or None, linewidth=1.4
    )
    if len(lines) > 1:
        axes.fill_between(steps, [min(v) for v in at_steps], [max(v) for v in at_steps], color=colour, alpha=0.15, lw=0)
