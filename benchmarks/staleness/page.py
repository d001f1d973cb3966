"""The table of docs/corrections.md about stale rollouts, from the figures that a run of the benchmark wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import origin, row, rule, spread


def table(figures: dict[str, Any]) -> str:
    """Medians over seeds, in brackets the lowest and the highest, and where they come from."""
    bounds = list(figures["rows"][0]["dropped"])
    lines = [row("updates", "tokens", "k3", "F(2)", *bounds), rule(names=2, figures=2 + len(bounds))]
    for each in figures["rows"]:
        shares = (spread(values, "{:.0%}") for values in each["dropped"].values())
        of_ratios = spread(each["k3"], "{:.2g}"), spread(each["f_2"], "{:.2g}")
        lines.append(row(str(each["updates"]), str(each["length"]), *of_ratios, *shares))
    return "\n".join([*lines, "", f"{origin(figures, 'torch')}; {figures['seeds']} seeds."])
