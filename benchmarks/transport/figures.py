"""The rounds, their medians, and what is aimed at."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.machine import hardware, versions, write_json
from benchmarks.transport.processes import PROCESSES, Chain, Cost, Look, chain
from benchmarks.transport.reader import FROM, ROLLOUT, WHOLE, Ask
from benchmarks.transport.tables import show
from benchmarks.transport.ways import ANSWERED, FILE, HTTP, INLINE, KEPT, NOTHING, RAY, STOCK, WAYS

# Of SGLang's own: bytes that the trainer reads, by model, and CPU time of all processes.
_BYTES_AT_MOST = {"Qwen3-30B-A3B": {FILE: 1 / 8, INLINE: 1 / 6}, "DeepSeek-V3": {FILE: 1 / 7, INLINE: 1 / 5}}
_CPU_AT_MOST = {FILE: 1 / 18, HTTP: 1 / 12, RAY: 1 / 12, INLINE: 1 / 8}
# Of fewer tokens the fixed costs of a request are most of it, and nothing is aimed at.
_AIMED_FROM = 32768

_CONVERSATIONS = ((NOTHING, WHOLE), (STOCK, WHOLE), (STOCK, FROM), (INLINE, WHOLE), (INLINE, ROLLOUT), (FILE, ROLLOUT))


@dataclass(frozen=True)
class Settings:
    """As of `python -m benchmarks.transport`."""

    rounds: int
    tokens: tuple[int, ...]
    models: tuple[str, ...]
    turns: int
    conversation: int


def measure(settings: Settings, json_file: Path | None) -> None:
    """Print the tables, and write their figures to `json_file`."""
    requests = [[Ask(way, model, tokens) for way in WAYS] for model in settings.models for tokens in settings.tokens]
    model = settings.models[0]
    talk = [Ask(way, model, settings.conversation, settings.turns, how) for way, how in _CONVERSATIONS]
    most = max((*settings.tokens, settings.conversation))
    with chain(dict.fromkeys(settings.models, most)) as running, Progress(transient=True) as progress:
        cases = [_case(running, asks, settings.rounds, progress) for asks in requests]
        conversations = [_case(running, talk, settings.rounds, progress)]
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": asdict(settings),
        "requests": cases,
        "conversations": conversations,
        "targets": targets(cases),
    }
    show(figures)
    if json_file is not None:
        write_json(figures, json_file)


def targets(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at, what was measured, and whether it holds."""
    found = []
    for case in cases:
        aims = {"CPU": _CPU_AT_MOST} if case["tokens"] >= _AIMED_FROM else {}
        if case["model"] in _BYTES_AT_MOST:
            aims["bytes"] = _BYTES_AT_MOST[case["model"]]
        rows = {row["way"]: row for row in case["rows"]}
        for kind, bounds in aims.items():
            for way, bound in bounds.items():
                measured = rows[way][f"{kind.lower()}_of_stock"]
                what = f"{kind}, {way} of SGLang's own, {case['tokens']:,} tokens of {case['model']}"
                found.append({"what": what, "at_most": bound, "measured": measured, "holds": measured <= bound})
    return found


def _case(running: Chain, asks: list[Ask], rounds: int, progress: Progress) -> dict[str, Any]:
    """One table: the ways in turns, after a round that warms up and one that looks."""
    first = asks[0]
    task = progress.add_task(f"{first.tokens:,} tokens of {first.model}", total=len(asks) * (rounds + 2))

    def each(do: Any) -> list[Any]:
        done = []
        for ask in asks:
            done.append(do(ask))
            progress.advance(task)
        return done

    each(running.run)
    looks: list[Look] = each(running.look)
    digests = {look.digest for ask, look in zip(asks, looks, strict=True) if ask.way != NOTHING}
    if len(digests) != 1:
        brought = {f"{ask.way} {ask.asked}": look.digest for ask, look in zip(asks, looks, strict=True)}
        raise RuntimeError(f"the ways do not bring the same experts: {brought}")
    costs: list[list[Cost]] = [each(running.run) for _ in range(rounds)]
    progress.remove_task(task)
    rows = [
        _row(ask, look, [turn[place] for turn in costs])
        for place, (ask, look) in enumerate(zip(asks, looks, strict=True))
    ]
    nothing, stock = (next(row for row in rows if row["way"] == way) for way in (NOTHING, STOCK))
    for row in rows:
        row["cpu_of_stock"] = (row["cpu_s"] - nothing["cpu_s"]) / (stock["cpu_s"] - nothing["cpu_s"])
        row["bytes_of_stock"] = row["bytes_read"] / stock["bytes_read"]
    return {"model": first.model, "tokens": first.tokens, "turns": first.turns, "rows": rows}


def _row(ask: Ask, look: Look, costs: list[Cost]) -> dict[str, Any]:
    """Medians over rounds; of the total, not the total of medians."""
    return {
        "way": ask.way,
        "asked": ask.asked,
        "wall_s": statistics.median(cost.wall for cost in costs),
        "cpu_s": statistics.median(cost.total for cost in costs),
        "cpu_s_by_process": {name: statistics.median(cost.cpu[name] for cost in costs) for name in PROCESSES},
        "peak_bytes_by_process": look.memory,
        "bytes_by_hop": look.hops,
        # What a trainer reads, in the answer and from the store.
        "bytes_read": look.hops[ANSWERED] + look.hops[KEPT],
    }
