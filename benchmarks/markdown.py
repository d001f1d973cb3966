"""Tables of the pages that are made of figures."""

from __future__ import annotations

from typing import Any


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def rule(*, names: int, figures: int) -> str:
    """What is between a table's head and its rows: columns of names, and of figures behind them."""
    return row(*["---"] * names, *["---:"] * figures)


def origin(figures: dict[str, Any]) -> str:
    """Where and when a benchmark's figures were seen."""
    hardware = figures["hardware"]
    return f"{figures['date']}, {hardware['cores']} cores of {hardware['cpu']}, SGLang {figures['versions']['sglang']}"
