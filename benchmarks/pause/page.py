"""The part of docs/transport.md about the scheduler's pause, from the figures that a run of the benchmark wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import origin, row, rule


def pauses(figures: dict[str, Any]) -> str:
    """The table, and where it comes from."""
    lines = [
        row("store", "one request, ms", "most", "together", "ms in all", "of them CPU", "first token of others"),
        rule(names=1, figures=6),
    ]
    for variant, of in figures["variants"].items():
        one, together, ratio = of["one"], of["together"], of["first_token_ratios"]["with_of_without"]
        lines.append(
            row(
                variant,
                f"{one['wall']:.2f}",
                f"{one['most_wall']:.2f}",
                f"{together['requests']}",
                f"{together['wall']:.1f}",
                f"{together['cpu']:.1f}",
                f"{ratio['ratio']:.2f} ± {ratio['error']:.2f}",
            )
        )
    settings = figures["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"{origin(figures)}; {settings['sizes']['tokens']:,} tokens of {settings['model']};"
            f" medians of {settings['rounds']} rounds.",
        ]
    )
