"""Run a soak and write its figures.

python -m tests.soak [--stock] [--rows N] [--seconds N] [--json FILE]
"""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

CONSOLE = Console()


def main(
    rows: Annotated[int, typer.Option(help="Returned rows to check.")] = 200_000,
    distinct: Annotated[int, typer.Option(help="Rows that their own request computed, at least.")] = 40_000,
    each: Annotated[int, typer.Option(help="Rows through load-back, storage and retraction each, at least.")] = 5_000,
    seconds: Annotated[float, typer.Option(help="Stop after that many, whatever was seen.")] = float("inf"),
    seed: Annotated[int, typer.Option(help="Of everything but the times at which things happen.")] = 0,
    stock: Annotated[bool, typer.Option(help="SGLang's own capture instead of ours.")] = False,
    write_policy: Annotated[str, typer.Option(help="Of the hierarchical cache; 'none' for no such cache.")] = (
        "write_through"
    ),
    storage: Annotated[bool, typer.Option(help="Files below the hierarchical cache.")] = True,
    page_size: Annotated[int, typer.Option(help="Of the KV pool.")] = 16,
    pool: Annotated[int, typer.Option(help="KV slots on the device.")] = 2048,
    dp_size: Annotated[int, typer.Option(min=1, max=2, help="Data-parallel ranks.")] = 2,
    clients: Annotated[int, typer.Option(help="That send at once.")] = 14,
    operator_pause: Annotated[float, typer.Option(help="Mean seconds between acts of the operator.")] = 4.0,
    unnamed_updates: Annotated[bool, typer.Option(help="Half of the weight updates have no name.")] = True,
    flag: Annotated[list[str], typer.Option(help="A further flag of the server; may be given again.")] = [],  # noqa: B006 (typer reads it)
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Everything that can happen to a request and to its KV, at once, on a real server; every row is checked."""
    import torch

    from benchmarks.machine import hardware, versions, write_json
    from examples.small_model import CHECKPOINT
    from tests.soak.run import Result, Setup, Target, soak

    torch.set_num_threads(1)
    hicache = None if write_policy == "none" else write_policy
    setup = Setup(
        stock, hicache, storage, page_size, pool, dp_size, clients, operator_pause, unnamed_updates, tuple(flag)
    )
    through_storage = each if hicache and storage else 0
    target = Target(rows, distinct, each if hicache else 0, through_storage, each, seconds)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, _progress() as bar:
        task = bar.add_task("starting", total=rows, state="")

        def show(result: Result) -> None:
            tally = result.tally
            state = f"{tally.wrong.total()} wrong, {tally.invalid.total()} invalid, {tally.events['faults']} faults;"
            state += "".join(f" {tally.rows[name]:,} {name}" for name in ("host", "storage", "retracted"))
            bar.update(task, description="rows", completed=tally.rows.total(), state=state)

        result = soak(CHECKPOINT, Path(folder), setup, target, seed, progress=show)
    about = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "versions": versions(), "seed": seed}
    report: dict[str, Any] = {**about, **result.report()}
    if json_file is not None:
        write_json(report, json_file)
    _print(result.tally.report(), result.memory)
    CONSOLE.print("status:", result.status)
    if result.tally.wrong.total() or result.tally.events["faults"] or result.unexplained:
        raise typer.Exit(1)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[state]}"), console=CONSOLE)


def _print(report: dict[str, Any], memory: list[tuple[float, int]]) -> None:
    table = Table("KV came from", "rows", "invalid", "wrong and marked valid")
    for name in report["rows"]:
        counts = (report[key].get(name, 0) for key in ("rows", "invalid rows", "wrong rows marked valid"))
        table.add_row(name, *(f"{count:,}" for count in counts))
    CONSOLE.print(table)
    distinct = report["distinct (token, forward pass) pairs"]
    CONSOLE.print(f"{distinct:,} distinct (token, forward pass) pairs; near ties: {report['near ties']}")
    CONSOLE.print(report["events"])
    if memory:
        sizes = [size / 2**20 for _, size in memory]
        CONSOLE.print(f"schedulers' resident MiB: {[round(size) for size in sizes[:: max(1, len(sizes) // 12)]]}")
    for fault in report["faults"]:
        CONSOLE.print(fault, markup=False)


if __name__ == "__main__":
    typer.run(main)
