"""Plots of the tokens' probability ratios: the tails F(tau), and the ratio by the rollout's probability."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from router_replay.mismatch.figures.diagnostics import Diagnostics
from router_replay.report import style
from router_replay.run.token_sample import TokenSample

_TICKS = (1.001, 1.01, 1.1, 2.0, 11.0, 101.0, 1001.0, 10001.0)


def draw_tails(axes: Axes, passes: Mapping[str, Diagnostics]) -> None:
    """F(tau) by tau for each trainer pass, both axes logarithmic; tau is drawn at tau - 1.

    Args:
        passes: their `ratio_tails` are drawn as they are, but for shares of 0, which have no logarithm.
    """
    highest = 1.1
    for number, (name, found) in enumerate(passes.items()):
        shares = [(tau, share) for tau, share in sorted(found.ratio_tails.items()) if share > 0]
        axes.plot(
            [tau - 1 for tau, _ in shares],
            [share for _, share in shares],
            color=style.colour(number),
            linestyle=style.line(number),
            linewidth=2,
            label=f"{name}: KL (k3) {found.k3:.1e} nats per token",
        )
        highest = max([highest, *(tau for tau, _ in shares)])
    count = max(found.num_tokens for found in passes.values())
    axes.axhline(1 / count, color=style.GREY, linewidth=1, linestyle=":")
    axes.annotate("one token", (0, 1 / count), (4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", color=style.GREY, fontsize=style.FONT - 1)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="ratio τ", ylabel="F(τ), share of tokens")
    lowest = min([tau - 1 for found in passes.values() for tau in found.ratio_tails], default=1e-3)
    axes.set_xlim(lowest, 1.3 * (highest - 1))
    axes.set_ylim(0.5 / count, 1.6)
    axes.xaxis.set_major_locator(FixedLocator([tau - 1 for tau in _TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda excess, _: f"{1 + excess:g}"))
    style.finish(axes)
    # Curves fall from the left: above them, on the right, there is room.
    axes.legend(frameon=False, fontsize=style.FONT - 1, loc="upper right")


def tails(passes: Mapping[str, Diagnostics]) -> Figure:
    """The figure of `draw_tails`."""
    figure = style.new_figure(8, 4.2)
    draw_tails(figure.subplots(), passes)
    return figure


def draw_scatter(axes: Axes, sample: TokenSample, number: int, linear_width: float) -> None:
    """Log r by the rollout's probability: sampled tokens as dots, the most extreme ones ringed.

    Tokens of probability 0 under the trainer, whose log r is -inf, are triangles at the lower edge.

    Args:
        number: of the series, for its colour.
        linear_width: abs(log r) up to which the axis is linear; beyond it grows as a logarithm.
    """
    points, extremes = sample.points.numpy(), sample.extremes.numpy()
    axes.axhline(0, color=style.INK, linewidth=1)
    for ratio in (0.5, 2.0):
        axes.axhline(np.log(ratio), color=style.GREY, linewidth=1, linestyle=":")
    axes.plot(
        np.exp(points[:, 0]),
        _finite(points[:, 1]),
        linestyle="",
        marker=".",
        markersize=4 if len(points) > 2000 else 7,
        markeredgewidth=0,
        alpha=0.35,
        color=style.colour(number),
        label="sampled tokens",
    )
    axes.plot(
        np.exp(extremes[:, 0]),
        _finite(extremes[:, 1]),
        linestyle="",
        marker="o",
        markersize=4.5,
        markerfacecolor="none",
        markeredgecolor=style.INK,
        markeredgewidth=0.6,
        label="largest |ln r|",
    )
    axes.set_xscale("log")
    axes.set_yscale("asinh", linear_width=linear_width)
    # Decades that fall into the linear part would be printed over each other.
    decades = [10.0**power for power in range(-9, 4) if 10.0**power >= linear_width and power != 0]
    decades += [math.log(2), 3.0]
    axes.yaxis.set_major_locator(FixedLocator([-each for each in decades] + [0.0] + decades))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.08)
    axes.set(xlabel="probability under the rollout", ylabel="ln r, r = trainer / rollout")
    impossible = np.exp(extremes[np.isneginf(extremes[:, 1]), 0])
    if len(impossible):
        bottom = axes.get_ylim()[0]
        axes.plot(impossible, np.full(len(impossible), bottom), linestyle="", marker="v", markersize=7,
                  color=style.INK, clip_on=False, label="trainer's probability is 0")  # fmt: skip
        axes.set_ylim(bottom=bottom)


def scatter(samples: Mapping[str, TokenSample]) -> Figure:
    """One panel of `draw_scatter` for each trainer pass, on the same axes."""
    columns = min(len(samples), 3)
    figure = style.new_figure(8 if columns < 3 else 10, 4.2 * -(-len(samples) // columns) + 0.3)
    spread = torch.cat([sample.points[:, 1] for sample in samples.values()]).abs()
    finite = spread[spread.isfinite()]
    linear_width = max(float(finite.quantile(0.9)), 1e-6) if len(finite) else 1.0
    drawn = style.panels(figure, len(samples), columns, shared=True)
    for number, (axes, (name, sample)) in enumerate(zip(drawn, samples.items(), strict=True)):
        draw_scatter(axes, sample, number, linear_width)
        style.finish(axes, f"{name}\n{len(sample.points):,} of {sample.total:,} tokens")
        axes.label_outer()
    keys = {text: handle for axes in drawn for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(keys.values()), list(keys), loc="outside upper center", ncols=3, frameon=False, markerscale=1.5,
                  fontsize=style.FONT - 1)  # fmt: skip
    return figure


def _finite(log_ratio: np.ndarray) -> np.ndarray:
    # Matplotlib leaves NaN out of lines and of the axis' range.
    return np.where(np.isfinite(log_ratio), log_ratio, np.nan)
