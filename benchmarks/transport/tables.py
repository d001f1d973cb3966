"""The tables on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.shown import aims_table, table
from benchmarks.transport.ways import HOPS

_MIB = 1 << 20


def show(figures: dict[str, Any]) -> None:
    """Print the tables of `benchmarks.transport.figures.measure`."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for case in figures["requests"] + figures["conversations"]:
        name = f"{case['tokens']:,} tokens of {case['model']}"
        if case["turns"] > 1:
            name = f"A conversation of {case['turns']} turns, {name}"
        console.print(_cpu(f"{name}: CPU ms by process", case))
        console.print(_memory(f"{name}: peak MiB by process above what it held, bytes by hop", case))
    aims = {aim["what"]: aim for aim in figures["targets"]}
    console.print(aims_table(aims, places=4))
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "settings")})


def _cpu(title: str, case: dict[str, Any]) -> Table:
    names = list(case["rows"][0]["cpu_s_by_process"])
    made = table(title, *names, "all", "wall ms", "CPU of SGLang's own")
    for row in case["rows"]:
        seconds = (*(row["cpu_s_by_process"][name] for name in names), row["cpu_s"], row["wall_s"])
        made.add_row(_name(case, row), *(f"{each * 1e3:.1f}" for each in seconds), f"{row['cpu_of_stock']:.4f}")
    return made


def _memory(title: str, case: dict[str, Any]) -> Table:
    names = list(case["rows"][0]["peak_bytes_by_process"])
    made = table(title, *names, *HOPS, "read, of SGLang's own")
    for row in case["rows"]:
        memory = (f"{row['peak_bytes_by_process'][name] / _MIB:.1f}" for name in names)
        hops = (f"{row['bytes_by_hop'][hop]:,}" for hop in HOPS)
        made.add_row(_name(case, row), *memory, *hops, f"{row['bytes_of_stock']:.4f}")
    return made


def _name(case: dict[str, Any], row: dict[str, Any]) -> str:
    return row["way"] if case["turns"] == 1 else f"{row['way']}, {row['asked']}"
