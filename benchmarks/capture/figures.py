"""The tables of what capture costs, and what is aimed at."""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.capture.serving import AGAIN, MASKS, OFF, SGLANG, STOCK, Load, Round, one_round, running
from benchmarks.interleaved import Seconds, median_seconds
from benchmarks.machine import hardware, versions, write_json
from benchmarks.shown import aims_table, median_and_error, table

_PAUSES = 15


def measure(
    rounds: int, load: Load, pause_tokens: int, model: str, served: Path | None, json_file: Path | None
) -> None:
    """Print the tables, and write their figures to `json_file`; arguments as of `python -m benchmarks.capture`."""
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    # Here and not above: SGLang takes its time.
    from benchmarks.capture.pause import pauses

    with pauses(model, pause_tokens) as (variants, settled):
        taken = median_seconds(variants, _PAUSES, cpu_time=time.thread_time, after=settled)
    console.print(
        _pause_table(f"The scheduler's pause when a request of {pause_tokens:,} tokens of {model} ends", taken)
    )
    serving = {} if served is None else _serving(rounds, load, served)
    if serving:
        sizes = f"{load.requests} requests of {load.prompt_tokens} + {load.new_tokens} tokens, {rounds} rounds"
        console.print(_serving_table(f"Servers: {sizes}", serving))
    aims = targets(serving, taken)
    console.print(aims_table(aims))
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {"rounds": rounds, "load": asdict(load), "pause_tokens": pause_tokens, "pause_at": model},
        "serving": serving,
        "pause": {name: seconds._asdict() for name, seconds in taken.items()},
        "targets": aims,
    }
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "settings")})
    if json_file is not None:
        write_json(figures, json_file)


def targets(serving: dict[str, dict[str, float]], taken: dict[str, Seconds]) -> dict[str, dict[str, Any]]:
    """What is aimed at, what was measured, and whether it holds.

    In CPU time, since others share the machine. A server may take what SGLang's own capture
    takes, and as much more as a server without capture differs from itself.
    """
    found = {"pause, ours in masks over SGLang's own": (1.0, taken[MASKS].cpu / taken[STOCK].cpu)}
    if serving:
        noise = abs(serving[AGAIN]["cpu_of_off"] - 1) + serving[AGAIN]["error"]
        found["CPU time, ours in masks over SGLang's own"] = (
            1 + noise,
            serving[MASKS]["cpu_of_off"] / serving[STOCK]["cpu_of_off"],
        )
    return {
        name: {"at_most": bound, "measured": value, "holds": value <= bound} for name, (bound, value) in found.items()
    }


def _serving(rounds: int, load: Load, model: Path) -> dict[str, dict[str, float]]:
    seen: dict[str, list[Round]] = {}
    with running(model) as servers:
        for number in track(range(rounds + 1), description="rounds", transient=True):
            for name, server in servers.items():
                measured = one_round(name, server, load, number)
                # The first one warms up.
                if number:
                    seen.setdefault(name, []).append(measured)
    tokens = load.requests * load.new_tokens
    return {name: _summary(each, seen[OFF], tokens) for name, each in seen.items()}


def _summary(seen: list[Round], off: list[Round], tokens: int) -> dict[str, float]:
    """Medians, and medians over rounds of the ratios to the server without capture, with the error of one."""
    ratios = [ours.cpu / theirs.cpu for ours, theirs in zip(seen, off, strict=True)]
    ratio, error = median_and_error(ratios)
    wall = statistics.median(each.wall for each in seen)
    return {
        "tokens_per_second": tokens / wall,
        "first_token_seconds": statistics.median(each.first_token for each in seen),
        "cpu_seconds": statistics.median(each.cpu for each in seen),
        "wall_of_off": statistics.median(a.wall / b.wall for a, b in zip(seen, off, strict=True)),
        "first_token_of_off": statistics.median(a.first_token / b.first_token for a, b in zip(seen, off, strict=True)),
        "cpu_of_off": ratio,
        "error": error,
    }


def _serving_table(title: str, serving: dict[str, dict[str, float]]) -> Table:
    columns = "tokens/s", "first token ms", "CPU s", "wall of off", "first token of off", "CPU of off", "+-"
    made = table(title, *columns)
    for name in (OFF, AGAIN, STOCK, MASKS, SGLANG):
        of = serving[name]
        absolute = (
            f"{of['tokens_per_second']:.0f}",
            f"{of['first_token_seconds'] * 1e3:.0f}",
            f"{of['cpu_seconds']:.2f}",
        )
        ratios = (f"{of[key]:.3f}" for key in ("wall_of_off", "first_token_of_off", "cpu_of_off", "error"))
        made.add_row(name, *absolute, *ratios)
    return made


def _pause_table(title: str, taken: dict[str, Seconds]) -> Table:
    made = table(title, "wall ms", "CPU ms", "CPU of SGLang's own")
    for name, seconds in taken.items():
        ratio = seconds.cpu / taken[STOCK].cpu
        made.add_row(name, f"{seconds.wall * 1e3:.1f}", f"{seconds.cpu * 1e3:.1f}", f"{ratio:.2f}")
    return made
