"""Compare Megatron-Core's own RouterReplay with this package's replay, on CPU ranks: docs/stock-replay.md.

    python scripts/stock_replay.py              # a table in the terminal
    python scripts/stock_replay.py --markdown   # the same in Markdown
    python scripts/stock_replay.py --write      # the same, in the page

Takes two to four minutes, and two processes at a time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from tests.megatron_router_replay.parallel.stock_outcome import Outcome
    from tests.megatron_router_replay.parallel.stock_rows import Row

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"guide": "RouterReplay, as its guide says", "hand": "RouterReplay, rows cut by hand", "ours": "this package"}
PAGE = ROOT / "docs" / "stock-replay.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--write", action="store_true", help="write it into docs/stock-replay.md")
    options = parser.parse_args()
    # The harness is in tests/, which is not installed.
    sys.path.insert(0, str(ROOT))
    # Before anything of Megatron, and not above: `--help` need not wait for it.
    import cpu_engines.megatron  # noqa: F401
    from tests.megatron_router_replay.parallel.stock_rows import ROWS

    cells = outcomes(ROWS)
    text = f"{markdown_table(ROWS, cells)}\n\n*{versions()}, {datetime.datetime.now(datetime.UTC).date()}*"
    if options.write:
        PAGE.write_text(TABLE.sub(lambda _: text + "\n", PAGE.read_text()))
    if options.markdown:
        print(text)
    else:
        Console().print(rich_table(ROWS, cells))
    return 0 if all(right_or_refused(row, cells[row, "ours"]) for row in ROWS) else 1


def outcomes(rows: Iterable[Row]) -> dict[tuple[Row, str], Outcome]:
    """Run every step of the table, those of one rank first."""
    from tests.megatron_router_replay.parallel.pool import RankPool
    from tests.megatron_router_replay.parallel.stock_outcome import Judge

    ordered = sorted(rows, key=lambda row: row.case.world_size)
    cases = list(dict.fromkeys(row.case.one_rank() for row in ordered))
    pools = {size: RankPool(size) for size in {row.case.world_size for row in ordered} | {1}}
    judge, found = Judge(pools), {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    try:
        with bar:
            task = bar.add_task("starting Megatron", total=len(cases) + sum(len(row.by) for row in ordered))
            for case in judge.prepare(cases):
                bar.update(task, advance=1, description=f"one rank: {case}"[:60])
            for size, same in itertools.groupby(ordered, key=lambda row: row.case.world_size):
                for row in same:
                    for use in row.uses():
                        found[row, use.by] = judge.flex(use) if row.flex else judge.outcome(row.case, use)
                        bar.update(task, advance=1, description=f"{row.group}: {row.what}"[:60])
                pools[size].close()
    finally:
        for pool in pools.values():
            pool.close()
    return found


def right_or_refused(row: Row, outcome: Outcome) -> bool:
    """Whether our cell is as it has to be: right, or for a mistake an error."""
    return outcome.right or bool(row.mistake and outcome.error)


def versions() -> str:
    names = {"megatron-core": "Megatron-Core", "torch": "torch"}
    return ", ".join(f"{title} {importlib.metadata.version(name)}" for name, title in names.items())


def cell(cells: dict[tuple[Row, str], Outcome], row: Row, by: str) -> str:
    """An outcome in a cell; of an error its class and first clause."""
    outcome = cells.get((row, by))
    if outcome is None:
        return "-"
    text = str(outcome)
    if outcome.error:
        # Ours end in the way out, behind a colon; the first clause says what is wrong.
        kind, _, message = outcome.error.partition(": ")
        text = f"error: {kind}: {message.partition(': ')[0].partition(', whose')[0]}"
    return text


def markdown_table(rows: Iterable[Row], cells: dict[tuple[Row, str], Outcome]) -> str:
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|"]
    for group, same in itertools.groupby(rows, key=lambda row: row.group):
        lines.append(f"| **{group}** | | | |")
        for row in same:
            texts = [cell(cells, row, by).replace("wrong without a word", "**wrong without a word**") for by in COLUMNS]
            lines.append(f"| {row.what} | {' | '.join(texts)} |")
    return "\n".join(lines)


def rich_table(rows: Iterable[Row], cells: dict[tuple[Row, str], Outcome]) -> Table:
    table = Table("", *COLUMNS.values(), title=f"replay on CPU ranks, {versions()}", show_lines=True)
    for row in rows:
        styles = {"right": "green", "wrong": "red", "error": "yellow"}
        texts = [cell(cells, row, by) for by in COLUMNS]
        colored = [f"[{styles[text[:5]]}]{_escaped(text)}" if text[:5] in styles else text for text in texts]
        table.add_row(f"{row.group}: {_escaped(row.what)}", *colored)
    return table


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
