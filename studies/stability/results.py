"""A finished run as a small file: what the study's tables are made of, and what another machine goes on from."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions, write_json
from examples.small_model import CHECKPOINT
from router_replay.errors import DataError
from router_replay.run.collapse import find_collapse
from studies.stability.protocol import REVISION, SEEDS, Arm, Run

RESULTS = Path(__file__).parent / "results"

KEPT = {
    "reward": "reward",
    "entropy": "entropy",
    "gradient_norm": "gradient_norm",
    "response_tokens": "response_tokens",
    "k3": "mismatch/k3",
    "f2": "mismatch/f_tau/2",
    "largest_ratio": "mismatch/max_ratio",
    "ess": "loss/weight_ess",
    "dropped": "loss/dropped",
    "clipped_low": "loss/clipped_low",
    "clipped_high": "loss/clipped_high",
    "kl_old": "loss/kl_k3",
    "groups_of_one_reward": "groups_of_one_reward",
}
"""Figures of a step that a result has, by the loop's names of them."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        steps: what is in `KEPT` of each step, from step 1, and its seconds; step 0 has an evaluation alone.
        evaluations: by step, on held-out problems.
        failed: what ended the run before its last step, if something of its own did, such as a gradient that is not
            finite.
    """

    steps: Sequence[Mapping[str, float]]
    evaluations: Mapping[int, float]
    failed: str | None = None

    def series(self, figure: str) -> list[float]:
        """A figure of `KEPT` over the steps."""
        return [float(step[figure]) for step in self.steps]

    @property
    def collapse(self) -> int | None:
        """The step at which the run collapsed, by the study's rule."""
        place = find_collapse(self.series("reward"))
        return None if place is None else place + 1

    @property
    def best(self) -> tuple[float, int]:
        """The best evaluation and the first step that had it."""
        score, step = max((score, -step) for step, score in self.evaluations.items())
        return score, -step

    @property
    def last(self) -> float:
        """The last evaluation."""
        return self.evaluations[max(self.evaluations)]


def path_of(run: Run, folder: Path = RESULTS) -> Path:
    """Where a run's result is, or will be."""
    return folder / f"{run.name}.json"


def write(run: Run, lines: Sequence[Mapping[str, Any]], folder: Path = RESULTS, *, failed: str | None = None) -> None:
    """Make the result of a run from the lines of figures that the loop wrote.

    Args:
        failed: what ended it before its last step.
    """
    steps = [
        {
            **{ours: line[theirs] for ours, theirs in KEPT.items() if theirs in line},
            "seconds": sum(line["seconds"].values()),
        }
        for line in lines[1:]
    ]
    found = {
        "arm": run.arm.name,
        "seed": run.seed,
        **protocol_of(run),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "failed": failed,
        "evaluations": {line["step"]: line["evaluation"] for line in lines if "evaluation" in line},
        "steps": steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(found, path_of(run, folder))


def read(run: Run, folder: Path = RESULTS) -> Result | None:
    """A run's result, None if it has none.

    Raises:
        DataError: what is there was run by another protocol, or is not whole.
    """
    path = path_of(run, folder)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        require_protocol(run, found, path)
        result = Result(
            steps=found["steps"],
            evaluations={int(step): score for step, score in found["evaluations"].items()},
            failed=found["failed"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no result ({error!r}): move it away, and the run is made anew") from error
    steps = len(result.steps)
    whole = steps < run.num_steps if result.failed else steps == run.num_steps
    evaluated = [*range(0, steps + 1, run.arm.settings(run.seed).evaluate_every)]
    if (
        not whole
        or sorted(result.evaluations) != evaluated
        or any(not KEPT.keys() <= step.keys() for step in result.steps)
    ):
        raise DataError(
            f"{path} is not whole ({steps} of {run.num_steps} steps, evaluations at {sorted(result.evaluations)}):"
            " move it away, and the run is made anew"
        )
    return result


def finished(arm: Arm, folder: Path = RESULTS) -> list[Result]:
    """The results that an arm has, by seed."""
    return [result for seed in SEEDS if (result := read(Run(arm, seed), folder)) is not None]


def protocol_of(run: Run) -> dict[str, Any]:
    """What a run's result depends on, as JSON has it; the start's weights by their digest."""
    made = {
        "settings": dataclasses.asdict(run.arm.settings(run.seed)),
        "rollout": dataclasses.asdict(run.arm.rollout),
        "start": dataclasses.asdict(run.arm.start),
        "checkpoint": _digest(),
        "revision": REVISION,
        "num_steps": run.num_steps,
    }
    return json.loads(json.dumps(made))


@functools.cache
def _digest() -> str:
    return hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()


def require_protocol(run: Run, found: Mapping[str, Any], path: Path) -> None:
    """Raise DataError unless what a file says of a run's protocol is what it is now."""
    for name, wanted in protocol_of(run).items():
        if found.get(name) != wanted:
            raise DataError(
                f"{path} was run with {name} {found.get(name)}, and the protocol says {wanted}: move it away, and the"
                " run is made anew"
            )
