"""Tables on the terminal, and how sure a ratio is, for every benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def table(title: str, *columns: str) -> Table:
    """A table with a column of names, and columns of figures."""
    made = Table("", title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def aims_table(aims: Mapping[str, Mapping[str, Any]], title: str = "Targets", *, places: int = 3) -> Table:
    """What is aimed at, by name: `at_most`, `measured`, and whether it `holds`."""
    made = table(title, "at most", "measured", "holds")
    for name, aim in aims.items():
        figures = (f"{aim[key]:.{places}f}" for key in ("at_most", "measured"))
        made.add_row(name, *figures, "yes" if aim["holds"] else "NO")
    return made


def median_and_error(ratios: Sequence[float]) -> tuple[float, float]:
    """The median, and two of its standard errors, for values of a normal distribution whose deviation is estimated by
    the median absolute one.
    """
    median = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(each - median) for each in ratios)
    return median, 2 * 1.2533 * deviation / len(ratios) ** 0.5
