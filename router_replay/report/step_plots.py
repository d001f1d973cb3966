"""Plots over the steps of a run: KL, tails, effective sample sizes, and where both sides' routes differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from router_replay.masks.agreement import RouteAgreement, RouteTally
from router_replay.mismatch.figures.diagnostics import Diagnostics
from router_replay.report import style
from router_replay.report.summary import StepFigures

MAX_COLUMNS = 120
"""Columns of the heat map; of more steps, several share a column."""


def kl_over_steps(steps: Sequence[StepFigures], names: Sequence[str]) -> Figure:
    """Estimates k3 (logarithmic where no value is 0) and k1 of KL(rollout || trainer), a line for each trainer pass."""
    figure = style.new_figure(9, 3.8)
    k3, k1 = figure.subplots(1, 2)
    _draw_steps(k3, steps, names, lambda found: found.k3)
    _draw_steps(k1, steps, names, lambda found: found.k1)
    k3.set_ylabel("k3, nats per token")
    k1.set_ylabel("k1, nats per token")
    _logarithmic_if_above_0(k3)
    k1.axhline(0, color=style.INK, linewidth=0.8)
    k1.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    style.finish(k3, "k3: low noise, never negative")
    style.finish(k1, "k1: unbiased, noisy")
    figure.legend(*k3.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                  fontsize=style.FONT - 1)  # fmt: skip
    return figure


def tails_and_sizes_over_steps(steps: Sequence[StepFigures], names: Sequence[str], tau: float) -> Figure:
    """F(tau) (logarithmic where no value is 0), and effective sample sizes of the weights r, by token and by sequence.

    Args:
        tau: one of the thresholds for which the steps' diagnostics have F(tau).
    """
    figure = style.new_figure(10, 3.8)
    tail, tokens, sequences = figure.subplots(1, 3)
    _draw_steps(tail, steps, names, lambda found: found.ratio_tails[tau])
    tail.set_ylabel(f"F({tau:g}), share of tokens")
    _logarithmic_if_above_0(tail)
    style.finish(tail, f"tokens with max(r, 1/r) > {tau:g}")
    for axes, size, what in (
        (tokens, lambda found: found.ess_token, "tokens"),
        (sequences, lambda found: found.ess_sequence, "sequences"),
    ):
        _draw_steps(axes, steps, names, size)
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel(f"effective share of {what}")
        style.finish(axes, f"sample size, {what}")
    figure.legend(*tail.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                  fontsize=style.FONT - 1)  # fmt: skip
    return figure


def _draw_steps(
    axes: Axes, steps: Sequence[StepFigures], names: Sequence[str], value: Callable[[Diagnostics], float]
) -> None:
    """A line over the steps for each trainer pass."""
    # Markers on each of many steps would hide the line.
    marked = len(steps) <= 60
    for number, name in enumerate(names):
        found = [(each.step, value(each.passes[name])) for each in steps if name in each.passes]
        axes.plot([step for step, _ in found], [each for _, each in found], label=name, linewidth=1.6,
                  color=style.colour(number), linestyle=style.line(number), markersize=5,
                  marker=style.marker(number) if marked else "")  # fmt: skip
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _logarithmic_if_above_0(axes: Axes) -> None:
    if min(value for line in axes.lines for value in np.asarray(line.get_ydata())) > 0:
        axes.set_yscale("log")
        return
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def draw_heat_map(axes: Axes, steps: Sequence[tuple[int, RouteTally]], layers: Sequence[int]) -> None:
    """Share of tokens whose experts differ, by layer (row, the first on top) and step, with its scale.

    Args:
        steps: (number, routes) in order; more than `MAX_COLUMNS` are added up in runs of equal numbers of steps.
        layers: decoder layers of the routes, or their places.
    """
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    columns = []
    for group in groups:
        first, *others = (steps[number][1] for number in group)
        columns.append(sum(others, start=first).agreement().differing_by_layer)
    shares = 100 * np.array(columns).T
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0)
    # A map of zeros has no scale of its own.
    image.set_clim(0, max(float(shares.max()), 0.1))
    axes.figure.colorbar(image, ax=axes, label="% of tokens")
    first_steps = [steps[int(group[0])][0] for group in groups]
    places = _some(len(groups), 10)
    axes.set_xticks(places, [str(first_steps[place]) for place in places])
    axes.yaxis.set_major_locator(FixedLocator(_some(len(layers))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda place, _: str(layers[int(place)])))
    style.finish(axes)
    axes.grid(visible=False)
    axes.set_xlabel("step" if len(groups) == len(steps) else f"step, the first of {len(groups[0])} in a column")


def draw_layers(axes: Axes, routes: RouteAgreement, layers: Sequence[int]) -> None:
    """Share of all tokens whose experts differ, a bar for each layer, the first on top."""
    percent = [100 * share for share in routes.differing_by_layer]
    bars = axes.barh(range(len(layers)), percent, color=style.colour(0), height=0.7)
    if len(layers) <= 16:
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=style.FONT - 1)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(_some(len(layers))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda place, _: str(layers[int(place)])))
    axes.set_xlim(0, 1.18 * max([*percent, 0.1]))
    axes.set(xlabel="% of tokens", ylabel="decoder layer (0-based)")
    style.finish(axes)
    axes.grid(visible=False, axis="y")


def route_heat_map(steps: Sequence[StepFigures], routes: RouteAgreement, moe_layers: Sequence[int] | None) -> Figure:
    """Heat map of layers and steps, beside the bars of all steps.

    Args:
        moe_layers: decoder layers of the routes; by default the routes' layers are numbered from 0.
    """
    count = len(routes.differing_by_layer)
    layers = range(count) if moe_layers is None else moe_layers
    figure = style.new_figure(9, min(2.6 + 0.16 * count, 10))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_heat_map(left, [(each.step, each.routes) for each in steps if each.routes is not None], layers)
    draw_layers(right, routes, layers)
    name = "MoE layer, in the routes' order" if moe_layers is None else "decoder layer (0-based)"
    left.set_ylabel(name)
    right.set_ylabel("")
    left.set_title("by step", fontsize=style.FONT + 1, loc="left")
    right.set_title("all steps", fontsize=style.FONT + 1, loc="left")
    return figure


def _some(count: int, most: int = 24) -> list[int]:
    return list(range(0, count, -(-count // most)))
