"""The tables of the scheduler's pause and of what others wait, and what is aimed at."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import hardware, versions, write_json
from benchmarks.pause.load import LongRequests
from benchmarks.pause.rounds import AGAIN, PHASES, QUIET, WITH, WITHOUT, Pause, Round, one_round
from benchmarks.pause.servers import FILE, INLINE, SLOW, STOCK, VARIANTS, Sizes, running
from benchmarks.shown import aims_table, median_and_error, table

_MOST_MS = 3.0


def measure(rounds: int, sizes: Sizes, stock_together: int, model: str, json_file: Path | None) -> None:
    """Print the tables, and write their figures to `json_file`; arguments as of `python -m benchmarks.pause`."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        of_variant = dataclasses.replace(sizes, together=stock_together) if variant == STOCK else sizes
        found[variant] = summary(_rounds(rounds, of_variant, variant, model))
    console.print(
        _pause_table(f"Pause of the scheduler's thread, requests of {sizes.tokens:,} tokens of {model}", found)
    )
    title = f"First token of others, median ms in {sizes.window:g} s after an end; ratios over {rounds} rounds"
    console.print(_first_token_table(title, found))
    aims = targets(found)
    console.print(aims_table(aims))
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {
            "rounds": rounds,
            "sizes": dataclasses.asdict(sizes),
            "stock_together": stock_together,
            "model": model,
        },
        "variants": found,
        "targets": aims,
    }
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "settings")})
    if json_file is not None:
        write_json(figures, json_file)


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Figures of one server, in milliseconds, and ratios of medians with the error of their median."""
    single = {asked: [pause for each in rounds for pause in each.single[asked]] for asked in (True, False)}
    together = {asked: [each.together[asked] for each in rounds] for asked in (True, False)}
    ratios = {
        name: _ratio([each.median_first_token(over) / each.median_first_token(WITHOUT) for each in rounds])
        for name, over in (("with_of_without", WITH), ("again_of_without", AGAIN))
    }
    return {
        "one": _ms(single[True]),
        "one_without": _ms(single[False]),
        "together": {**_ms(together[True]), "requests": together[True][0].requests},
        "together_without": _ms(together[False]),
        "steps": max(pause.steps for pause in together[True]),
        "table_ms": {
            "with": 1e3 * max(each.table[True] for each in rounds),
            "without": 1e3 * max(each.table[False] for each in rounds),
        },
        "first_token_ms": {
            phase: _quantiles([taken for each in rounds for taken in each.first_tokens[phase]]) for phase in PHASES
        },
        "first_token_ratios": ratios,
    }


def targets(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is aimed at, what was measured, and whether it holds.

    Others may wait as much longer after ends with routes as they do from one end without routes to the next.
    """
    aims = {}
    for variant in (INLINE, FILE, SLOW):
        one, together = found[variant]["one"], found[variant]["together"]
        aims[f"{variant}, one request, ms"] = (_MOST_MS, one["wall"])
        aims[f"{variant}, {together['requests']} together, ms of each"] = (
            _MOST_MS,
            together["wall"] / together["requests"],
        )
    ratios = found[SLOW]["first_token_ratios"]
    noise = abs(ratios["again_of_without"]["ratio"] - 1) + ratios["again_of_without"]["error"]
    aims[f"{SLOW}, first token of others, with over without routes"] = (
        1 + noise + ratios["with_of_without"]["error"],
        ratios["with_of_without"]["ratio"],
    )
    return {
        name: {"at_most": bound, "measured": value, "holds": value <= bound} for name, (bound, value) in aims.items()
    }


def _rounds(rounds: int, sizes: Sizes, variant: str, model: str) -> list[Round]:
    with running(variant, model, sizes) as measured:
        longs = LongRequests(measured, sizes, variant, model)
        # The prefix is computed now, and everything has happened once before it is measured.
        for with_routes in (False, True):
            longs.check(longs.end(sizes.together, with_routes=with_routes), with_routes=with_routes)
        return [one_round(measured, longs, sizes) for _ in track(range(rounds), variant, transient=True)]


def _ms(pauses: Sequence[Pause]) -> dict[str, float]:
    wall, cpu = ([1e3 * getattr(pause.seconds, name) for pause in pauses] for name in ("wall", "cpu"))
    return {
        "wall": statistics.median(wall),
        "most_wall": max(wall),
        "cpu": statistics.median(cpu),
        "most_cpu": max(cpu),
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e3 * each for each in seconds)
    return {
        "median": statistics.median(ordered),
        "p90": ordered[len(ordered) * 9 // 10],
        "most": ordered[-1],
        "requests": len(ordered),
    }


def _ratio(ratios: Sequence[float]) -> dict[str, float]:
    ratio, error = median_and_error(ratios)
    return {"ratio": ratio, "error": error}


def _pause_table(title: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = (
        "one: ms",
        "most",
        "CPU ms",
        "without routes",
        "together",
        "ms",
        "most",
        "CPU ms",
        "without routes",
        "table ms",
    )
    made = table(title, *columns)
    for variant, of in found.items():
        one, together = of["one"], of["together"]
        made.add_row(
            variant,
            *(f"{value:.2f}" for value in (one["wall"], one["most_wall"], one["cpu"], of["one_without"]["wall"])),
            f"{together['requests']} in {of['steps']}",
            *(f"{together[key]:.1f}" for key in ("wall", "most_wall", "cpu")),
            f"{of['together_without']['wall']:.1f}",
            f"{of['table_ms']['with']:.1f}",
        )
    return made


def _first_token_table(title: str, found: Mapping[str, Mapping[str, Any]]) -> Table:
    made = table(title, QUIET, WITHOUT, WITH, AGAIN, "with/without", "+-", "again/without", "+-")
    for variant, of in found.items():
        medians = (f"{of['first_token_ms'][phase]['median']:.0f}" for phase in PHASES)
        ratios = (f"{each[key]:.3f}" for each in of["first_token_ratios"].values() for key in ("ratio", "error"))
        made.add_row(variant, *medians, *ratios)
    return made
