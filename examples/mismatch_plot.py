"""The picture of a run: tails of the probability ratio, and where routes differ."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.machine import write_whole
from examples.replay_report import REPORTED_TAUS, Comparison

NATIVE, REPLAY = "#c1432e", "#1f6f8b"
TAUS = tuple(sorted({*REPORTED_TAUS, *(1 + float(excess) for excess in np.geomspace(1e-3, 20, 300))}))
"""Thresholds at which F(tau) is drawn: pass them to `compare`."""


def plot_mismatch(comparison: Comparison, path: Path) -> None:
    """Write the picture: F(tau) of the sampled tokens, and the share of differing routes by decoder layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    _draw_tails(left, comparison)
    _draw_layers(right, comparison)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        write_whole(path, lambda partial: figure.savefig(partial, dpi=130, metadata={"Software": None}))
    finally:
        plt.close(figure)


def _draw_tails(axes: Axes, comparison: Comparison) -> None:
    count = comparison.native.num_tokens
    highest = 1.05
    for found, name, colour in (
        (comparison.native, "trainer's own routes", NATIVE),
        (comparison.replay, "rollout's routes replayed", REPLAY),
    ):
        shares = [(tau, share) for tau, share in sorted(found.ratio_tails.items()) if share > 0]
        taus = [tau for tau, _ in shares]
        label = f"{name}: KL (k3) {found.k3:.1e} nats per token"
        axes.plot(taus, [share for _, share in shares], color=colour, linewidth=2, label=label)
        highest = max([highest, *taus])
    axes.axhline(1 / count, color="grey", linewidth=1, linestyle=":")
    axes.annotate("one token", (0, 1 / count), (4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", color="grey", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="ratio τ", ylabel="F(τ), share of tokens")
    right = highest**1.05
    axes.set_xlim(1, right)
    axes.set_title(f"How many of {count:,} sampled tokens have a ratio\nof probabilities, trainer to rollout, beyond τ",
                   fontsize=11, loc="left")  # fmt: skip
    # A logarithmic axis that spans less than a decade has no ticks of its own.
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if (right - 1) / step <= 7)
    axes.xaxis.set_major_locator(FixedLocator([1 + step * number for number in range(8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tau, _: f"{tau:.4g}"))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_layers(axes: Axes, comparison: Comparison) -> None:
    layers = list(comparison.differing_by_layer)
    percent = [100 * share for share in comparison.differing_by_layer.values()]
    bars = axes.bar([str(layer) for layer in layers], percent, color=NATIVE, width=0.65)
    if len(layers) <= 12:
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axes.set(xlabel="decoder layer with a router (0-based)", ylabel="% of tokens")
    axes.set_title("Tokens for which the trainer's router\nchooses other experts than the rollout's",
                   fontsize=11, loc="left")  # fmt: skip
    axes.margins(y=0.12)
