"""The tables of docs/stability.md, from the results that are committed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import row, rule, spread
from studies.stability.protocol import ARMS, SEEDS, STEPS
from studies.stability.results import RESULTS, Result, finished

ENDS = 10
"""Steps that "at the start" and "at the end" are means over."""

PUBLISHED = (
    ("nothing", "GRPO, one update a step", "62.23", "60"),
    ("TIS", "GRPO + TIS, one update a step", "66.24", "105"),
    ("R3", "GRPO + R3, one update a step", "71.83", "none"),
    ("R3+TIS", "GRPO + R3 + TIS, one update a step", "1.69 below R3", ""),
    ("R3", "GRPO + R3, several", "68.05", ""),
    ("GSPO", "GSPO, several", "66.76", ""),
    ("GSPO+R3", "GSPO + R3, several", "69.00", ""),
)
"""Arms, and what arXiv 2510.11370 has of them on Qwen3-30B-A3B after supervised fine-tuning: runs, scores in percent of
five mathematical benchmarks, and steps of collapse, where it gives one."""

_SCORE, _SMALL = "{:.3f}", "{:.2g}"


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
        found = finished(arm, folder)
        # Of a run that failed in its first step nothing but that is known.
        known = [each for each in found if each.steps]
        if not known:
            lines.append(row(arm.name, str(len(found)), _ends(found), *[""] * 11))
            continue
        best = [each.best for each in known]
        lines.append(
            row(
                arm.name,
                str(len(found)),
                _ends(found),
                spread([score for score, _ in best], _SCORE),
                ", ".join(str(step) for _, step in best),
                spread([each.last for each in known], _SCORE),
                spread([_mean(each, "reward", slice(-ENDS, None)) for each in known], _SCORE),
                spread([_mean(each, "k3", slice(ENDS)) for each in known], _SMALL),
                spread([_mean(each, "k3", slice(-ENDS, None)) for each in known], _SMALL),
                spread([_mean(each, "f2", slice(ENDS)) for each in known], _SMALL),
                spread([_mean(each, "f2", slice(-ENDS, None)) for each in known], _SMALL),
                spread([max(each.series("gradient_norm")) for each in known], "{:.1f}"),
                spread([_clipped(each) for each in known], "{:.1%}"),
                spread([statistics.median(each.series("seconds")) for each in known], "{:.1f}"),
            )
        )
    return "\n".join(lines)


def evaluations(folder: Path = RESULTS) -> str:
    """Scores on the held-out problems by step, the median over an arm's runs and what lies between all of them."""
    runs = {arm.name: finished(arm, folder) for arm in ARMS.values()}
    steps = sorted({step for found in runs.values() for each in found for step in each.evaluations})
    lines = [row("arm", *(f"step {step}" for step in steps)), rule(names=1, figures=len(steps))]
    for name, found in runs.items():
        if found:
            scores = ([each.evaluations[step] for each in found if step in each.evaluations] for step in steps)
            lines.append(row(name, *(spread(each, _SCORE) if each else "" for each in scores)))
    return "\n".join(
        [*lines, "", f"*{sum(map(len, runs.values()))} of {len(ARMS) * len(SEEDS)} runs of {STEPS} steps.*"]
    )


def beside(folder: Path = RESULTS) -> str:
    """What was published of the same arms, beside what was seen here."""
    lines = [
        row("arm", "there", "score there", "collapsed there at step", "best score here", "last", "collapsed here"),
        rule(names=2, figures=5),
    ]
    for arm, there, score, collapsed in PUBLISHED:
        found = finished(ARMS[arm], folder)
        known = [each for each in found if each.steps]
        best = spread([each.best[0] for each in known], _SCORE) if known else ""
        last = spread([each.last for each in known], _SCORE) if known else ""
        lines.append(row(arm, there, score, collapsed, best, last, _ends(found)))
    return "\n".join(lines)


def _ends(found: Sequence[Result]) -> str:
    """Where runs collapsed or failed."""
    if not found:
        return "not run"
    failed = (f"failed at {len(each.steps) + 1}" if each.failed else None for each in found)
    return ", ".join(said or str(each.collapse or "none") for said, each in zip(failed, found, strict=True))


def _clipped(result: Result) -> float:
    """Share of tokens, under GSPO of responses, whose gradient clipping stops."""
    return _mean(result, "clipped_low", slice(None)) + _mean(result, "clipped_high", slice(None))


def _mean(result: Result, figure: str, steps: slice) -> float:
    return statistics.fmean(result.series(figure)[steps])
