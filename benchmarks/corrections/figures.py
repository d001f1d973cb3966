"""Every figure over all seeds, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.corrections.estimators import CORRECTIONS
from benchmarks.corrections.gradients import SCENARIOS, Scenario, errors_of, mismatch_of
from benchmarks.corrections.rollouts import Rollout
from benchmarks.corrections.training import REGIMES, Regime, first_policies, fixed_errors, train
from benchmarks.machine import hardware, versions, write_json
from benchmarks.shown import table

POINTS = 4
"""Parts of a training, at the ends of which rewards are looked at."""

NEAR = 0.05
"""By how much less than its control's a reward is still the same."""

Spread = dict[str, float]


def measure(num_seeds: int, first_seed: int, batches: int, rollouts: int, json_file: Path | None) -> None:
    """Print the tables, and write their figures to `json_file`; arguments as of `python -m benchmarks.corrections`."""
    torch.set_num_threads(1)
    seeds = range(first_seed, first_seed + num_seeds)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=len(SCENARIOS) * len(CORRECTIONS) + len(REGIMES) * rollouts)

        def advance() -> None:
            progress.advance(bar)

        gradients, training = {}, {}
        for scenario in SCENARIOS:
            progress.update(bar, description=f"gradients: {scenario.name}")
            gradients[scenario.name] = gradient_figures(scenario, seeds, batches, advance)
        for regime in REGIMES:
            progress.update(bar, description=f"training: {regime.name}")
            training[regime.name] = training_figures(regime, seeds, rollouts, advance)
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {"seeds": list(seeds), "batches": batches, "rollouts": rollouts},
        "gradients": gradients,
        "training": training,
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, of in gradients.items():
        console.print(_gradient_table(name, of))
    for name, of in training.items():
        console.print(_training_table(name, of))
    console.print(f"Medians over {num_seeds} seeds, lowest and highest in brackets.")
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "settings")})
    if json_file is not None:
        write_json(figures, json_file)


def gradient_figures(
    scenario: Scenario, seeds: Sequence[int], batches: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Bias and noise of each correction, and the mismatch, as spreads over the seeds.

    `left` is the bias of a seed as a share of that without correction.
    """
    found, seen = errors_of(scenario, seeds, batches, advance)
    for of in found.values():
        of["left"] = of["bias"] / found["none"]["bias"]
    return {
        "settings": dataclasses.asdict(scenario),
        "mismatch": {name: spread(each.tolist()) for name, each in seen.items()},
        "corrections": {name: {key: spread(each.tolist()) for key, each in of.items()} for name, of in found.items()},
    }


def training_figures(
    regime: Regime, seeds: Sequence[int], rollouts: int, advance: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Rewards of each arm at the end and on the way, as spreads over the seeds.

    `near` and `better` are numbers of seeds: in which the reward at the end is at most `NEAR` below that of the seed's
    control, and in which it is above that without correction.
    """
    reached = train(regime, seeds, rollouts, POINTS, advance)
    (_, of_control), *others = reached.items()
    arms: dict[str, dict[str, Any]] = {}
    for (correction, kind), rewards in others:
        arms.setdefault(correction, {})[kind] = {
            "points": [spread(each.tolist()) for each in rewards],
            "near": int((rewards[-1] >= of_control[-1] - NEAR).sum()),
            "better": int((rewards[-1] > reached["none", kind][-1]).sum()),
        }
    first, rewards = first_policies(seeds)
    seen = mismatch_of(Rollout.of_all(first.with_errors(fixed_errors(regime.error, seeds)), first, rewards))
    return {
        "settings": dataclasses.asdict(regime),
        "mismatch": {name: spread(each.tolist()) for name, each in seen.items()},
        "control": {"points": [spread(each.tolist()) for each in of_control]},
        "corrections": arms,
    }


def spread(values: Sequence[float]) -> Spread:
    """The median, and between which values all are."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _gradient_table(name: str, of: Any) -> Table:
    seen = "; ".join(f"{key} {_shown(each, '.2g')}" for key, each in of["mismatch"].items())
    made = table(f"Gradient, {name}: {seen}", "bias", "resolved to", "noise of a batch")
    for correction, found in of["corrections"].items():
        made.add_row(correction, *(_shown(found[key], ".2f") for key in ("bias", "resolution", "noise")))
    return made


def _training_table(name: str, of: Any) -> Table:
    kinds = of["settings"]["kinds"]
    seen = "; ".join(f"{key} {_shown(each, '.2g')}" for key, each in of["mismatch"].items())
    columns = [column for kind in kinds for column in (f"{kind}: a quarter", "the end", "near control", "above none")]
    made = table(f"Reward, {name}; of the same error at the start: {seen}", *columns)
    control = of["control"]["points"]
    made.add_row("control", _shown(control[1], ".2f"), _shown(control[-1], ".2f"))
    for correction, arms in of["corrections"].items():
        cells = []
        for kind in kinds:
            points = arms[kind]["points"]
            cells += [
                _shown(points[1], ".2f"),
                _shown(points[-1], ".2f"),
                str(arms[kind]["near"]),
                str(arms[kind]["better"]),
            ]
        made.add_row(correction, *cells)
    return made


def _shown(of: Spread, form: str) -> str:
    return f"{of['median']:{form}} [{of['lowest']:{form}}, {of['highest']:{form}}]"
