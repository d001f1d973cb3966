"""Plots of importance weights: their histogram, and what is left of the batch under them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from router_replay.report import style
from router_replay.report.weight_figures import WeightFigures

Series = Mapping[str, Mapping[str, WeightFigures]]
"""Weights by correction, then by trainer pass; what the trainer applied is of the pass "as applied"."""


def series_number(name: str, passes: list[str]) -> int:
    """Place of a pass among the report's colours; weights as applied come behind all passes."""
    return passes.index(name) if name in passes else len(passes)


def weight_histograms(corrections: Series, passes: list[str]) -> Figure:
    """A panel for each correction: share of response tokens (logarithmic) by weight (logarithmic)."""
    columns = 3
    figure = style.new_figure(10, 2.5 * -(-len(corrections) // columns) + 0.4)
    drawn = style.panels(figure, len(corrections), columns)
    names: dict[str, Artist] = {}
    for axes, (title, by_pass) in zip(drawn, corrections.items(), strict=True):
        reach = max(figures.reach for figures in by_pass.values())
        for name, figures in by_pass.items():
            number = series_number(name, passes)
            edges, shares = figures.histogram(reach)
            names[name] = axes.stairs(shares.numpy(), edges.numpy(), color=style.colour(number), linewidth=1.6,
                                      linestyle=style.line(number), label=name, baseline=None)  # fmt: skip
        smallest = min(1 / figures.total.tokens for figures in by_pass.values())
        # The range first: a histogram of weights that are all 0 has none of its own.
        axes.set_ylim(0.5 * smallest, 2)
        axes.set_yscale("log")
        half = math.log(reach)
        axes.xaxis.set_major_locator(FixedLocator([-half, 0, half]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda log, _: f"{math.exp(log):.4g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        zeros = ", ".join(f"{1 - figures.kept_share:.2%}" for figures in by_pass.values())
        style.finish(axes)
        axes.set_title(f"{title}\nweight 0: {zeros}", fontsize=style.FONT - 0.5, loc="left")
        axes.set_xlabel("weight")
        axes.set_ylabel("share of tokens")
    figure.legend(list(names.values()), list(names), loc="outside upper center", ncols=3, frameon=False,
                  fontsize=style.FONT - 1)  # fmt: skip
    return figure


def effective_sample_sizes(corrections: Series, passes: list[str]) -> Figure:
    """Bars of the effective sample size, with the lowest step's as a line, beside the share of tokens that are kept."""
    rows = [(title, name, figures) for title, by_pass in corrections.items() for name, figures in by_pass.items()]
    figure = style.new_figure(9, 1.1 + 0.26 * len(rows) + 0.12 * len(corrections))
    left, right = figure.subplots(1, 2, sharey=True)
    places: list[float] = []
    ticks: dict[str, list[float]] = {}
    for title, _, _ in rows:
        gap = 0.0 if not places else 1.0 if title in ticks else 1.5
        places.append((places[-1] if places else 0.0) + gap)
        ticks.setdefault(title, []).append(places[-1])
    for name in dict.fromkeys(name for _, name, _ in rows):
        number = series_number(name, passes)
        of_pass = [(place, figures) for place, (_, each, figures) in zip(places, rows, strict=True) if each == name]
        at = [place for place, _ in of_pass]
        look = {"height": 0.85, "color": style.colour(number), "label": name}
        for axes, shares in (
            (left, [figures.total.effective_share for _, figures in of_pass]),
            (right, [figures.kept_share for _, figures in of_pass]),
        ):
            bars = axes.barh(at, [100 * share for share in shares], **look)
            axes.bar_label(bars, [_percent(share) for share in shares], padding=3, fontsize=style.FONT - 2)
        for place, figures in of_pass:
            lowest = 100 * figures.lowest[0]
            left.plot([lowest, lowest], [place - 0.42, place + 0.42], color=style.INK, linewidth=2)
    left.set_yticks([sum(each) / len(each) for each in ticks.values()], list(ticks))
    left.invert_yaxis()
    for axes, title in ((left, "effective sample size"), (right, "tokens kept (weight above 0)")):
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("% of response tokens")
        style.finish(axes, title)
        axes.grid(visible=False, axis="y")
    right.tick_params(axis="y", left=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                  fontsize=style.FONT - 1)  # fmt: skip
    return figure


def _percent(share: float) -> str:
    # A few tokens of a million are not none.
    return ">99.9 %" if 0.9995 <= share < 1 - 1e-9 else f"{100 * share:.1f} %"
