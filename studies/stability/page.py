"""The tables of docs/stability.md, from the results that are committed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.markdown import row, rule
from studies.stability.protocol import ARMS, SEEDS, STEPS, Run
from studies.stability.results import RESULTS, Result, read

ENDS = 10
"""Steps that "at the start" and "at the end" are means over."""


def table(folder: Path = RESULTS) -> str:
    """Arms, with their runs' figures: one run as it is, several as the median and what lies between all of them."""
    lines = [
        row(
            "arm",
            "seeds",
            "collapsed at step",
            "best score",
            "at step",
            "last score",
            "reward, last ten steps",
            "k3, nats: start",
            "end",
            "F(2): start",
            "end",
            "gradient, largest norm",
            "clipped",
            "seconds a step",
        ),
        rule(names=1, figures=13),
    ]
    for arm in ARMS.values():
        found = [result for seed in SEEDS if (result := read(Run(arm, seed), folder)) is not None]
        if not found:
            lines.append(row(arm.name, "not run", *[""] * 12))
            continue
        lines.append(
            row(
                arm.name,
                str(len(found)),
                ", ".join(_end(each) for each in found),
                _spread([each.best[0] for each in found], lambda value: f"{value:.3f}"),
                ", ".join(str(each.best[1]) for each in found),
                _spread([each.last for each in found], lambda value: f"{value:.3f}"),
                _spread([_mean(each, "reward", slice(-ENDS, None)) for each in found], lambda value: f"{value:.3f}"),
                _spread([_mean(each, "k3", slice(ENDS)) for each in found], _scientific),
                _spread([_mean(each, "k3", slice(-ENDS, None)) for each in found], _scientific),
                _spread([_mean(each, "f2", slice(ENDS)) for each in found], _scientific),
                _spread([_mean(each, "f2", slice(-ENDS, None)) for each in found], _scientific),
                _spread([max(each.series("gradient_norm")) for each in found], lambda value: f"{value:.1f}"),
                _spread([_clipped(each) for each in found], lambda value: f"{value:.1%}"),
                _spread([statistics.median(each.series("seconds")) for each in found], lambda value: f"{value:.1f}"),
            )
        )
    return "\n".join(lines)


def evaluations(folder: Path = RESULTS) -> str:
    """Scores on the held-out problems by step, the median over an arm's runs and what lies between all of them."""
    runs = {
        arm.name: [result for seed in SEEDS if (result := read(Run(arm, seed), folder)) is not None]
        for arm in ARMS.values()
    }
    steps = sorted({step for found in runs.values() for each in found for step in each.evaluations})
    lines = [row("arm", *(f"step {step}" for step in steps)), rule(names=1, figures=len(steps))]
    for name, found in runs.items():
        if found:
            scores = ([each.evaluations[step] for each in found if step in each.evaluations] for step in steps)
            lines.append(row(name, *(_spread(each, lambda value: f"{value:.3f}") if each else "" for each in scores)))
    return "\n".join(
        [*lines, "", f"*{sum(map(len, runs.values()))} of {len(ARMS) * len(SEEDS)} runs of {STEPS} steps.*"]
    )


def _end(result: Result) -> str:
    """Where a run collapsed or failed."""
    if result.failed is not None:
        return f"failed at {len(result.steps) + 1}"
    return "none" if result.collapse is None else str(result.collapse)


def _clipped(result: Result) -> float:
    """Share of tokens, under GSPO of responses, whose gradient clipping stops."""
    return _mean(result, "clipped_low", slice(None)) + _mean(result, "clipped_high", slice(None))


def _mean(result: Result, figure: str, steps: slice) -> float:
    return statistics.fmean(result.series(figure)[steps])


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    middle = form(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form(min(values))} to {form(max(values))})"


def _scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
