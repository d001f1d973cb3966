"""Tables of the pages that are made of figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def rule(*, names: int, figures: int) -> str:
    """What is between a table's head and its rows: columns of names, and of figures behind them."""
    return row(*["---"] * names, *["---:"] * figures)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and in brackets the lowest and the highest; a single value alone. `form` is one of `str.format`."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def origin(figures: Mapping[str, Any], package: str = "SGLang") -> str:
    """Where and when a benchmark's figures were seen, and with which release of a package."""
    hardware, version = figures["hardware"], figures["versions"][package.lower()]
    return f"{figures['date']}, {hardware['cores']} cores of {hardware['cpu']}, {package} {version}"
