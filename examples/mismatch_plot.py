"""The picture of a run: tails of the probability ratio, and where routes differ."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from examples.replay_report import REPORTED_TAUS, Comparison, write_whole

NATIVE, REPLAY = "#c1432e", "#1f6f8b"
TAUS = tuple(sorted({*REPORTED_TAUS, *(float(tau) for tau in np.geomspace(1.005, 20, 160))}))
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
    for found, name, colour in (
        (comparison.native, "trainer's own routes", NATIVE),
        (comparison.replay, "routes replayed", REPLAY),
    ):
        shares = [(tau, share) for tau, share in sorted(found.ratio_tails.items()) if share > 0]
        label = f"{name}, KL (k3) {found.k3:.1e} nats"
        axes.plot([tau for tau, _ in shares], [share for _, share in shares], color=colour, linewidth=2, label=label)
    axes.axhline(1 / count, color="grey", linewidth=1, linestyle=":")
    axes.annotate("one token", (1, 1 / count), (-3, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", color="grey", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="τ", ylabel=f"F(τ), share of {count:,} sampled tokens")
    axes.set_title("Tokens with max(r, 1/r) > τ,  r = p trainer / p rollout", fontsize=11, loc="left")
    highest = max([2.0, *(tau for tau, share in comparison.native.ratio_tails.items() if share > 0)])
    axes.set_xlim(min(comparison.native.ratio_tails), highest * 1.1)
    axes.set_xticks([tau for tau in (1.01, 1.1, 1.5, 2, 3, 5, 10, 20) if tau <= highest * 1.1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tau, _: f"{tau:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _draw_layers(axes: Axes, comparison: Comparison) -> None:
    layers = list(comparison.differing_by_layer)
    shares = list(comparison.differing_by_layer.values())
    bars = axes.bar([str(layer) for layer in layers], shares, color=NATIVE, width=0.65)
    if len(layers) <= 12:
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="decoder layer with a router (0-based)", ylabel="share of tokens")
    axes.set_title("Other experts than the rollout's, without replay", fontsize=11, loc="left")
    axes.margins(y=0.12)
