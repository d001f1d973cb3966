"""A finished run as a small file: what the study's tables are made of, and what another machine goes on from."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions, write_json
from router_replay.errors import DataError
from router_replay.run.collapse import find_collapse
from studies.stability.protocol import Run

RESULTS = Path(__file__).parent / "results"

KEPT = {
    "reward": "reward",
    "evaluation": "evaluation",
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
}
"""Figures of a step that a result has, by the loop's names of them."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        arm: its name.
        seed: of its problems.
        steps: what is in `KEPT` of each step, from step 1, and its seconds; step 0 has an evaluation alone.
        evaluations: by step, on held-out problems.
    """

    arm: str
    seed: int
    steps: Sequence[Mapping[str, float]]
    evaluations: Mapping[int, float]

    def series(self, figure: str) -> list[float]:
        """A figure of `KEPT` over the steps."""
        return [step[figure] for step in self.steps]

    @property
    def collapse(self) -> int | None:
        """The step at which the run collapsed, by the study's rule."""
        place = find_collapse(self.series("reward"))
        return None if place is None else place + 1

    @property
    def best(self) -> tuple[float, int]:
        """The best evaluation and the first step that had it."""
        return max((score, -step) for step, score in self.evaluations.items())[0], -max(
            (score, -step) for step, score in self.evaluations.items()
        )[1]


def path_of(run: Run, folder: Path = RESULTS) -> Path:
    """Where a run's result is, or will be."""
    return folder / f"{run.name}.json"


def write(run: Run, lines: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> None:
    """Make the result of a run from the lines of figures that the loop wrote."""
    _, *others = lines
    steps = [
        {
            **{ours: line[theirs] for ours, theirs in KEPT.items() if theirs in line},
            "seconds": sum(line["seconds"].values()),
        }
        for line in others
    ]
    found = {
        "arm": run.arm.name,
        "seed": run.seed,
        **_protocol(run),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "evaluations": {line["step"]: line["evaluation"] for line in lines if "evaluation" in line},
        "steps": steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(found, path_of(run, folder))


def read(run: Run, folder: Path = RESULTS) -> Result | None:
    """A run's result, None if it is not finished.

    Raises:
        DataError: what is there was run with other settings, or is not whole.
    """
    path = path_of(run, folder)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for name, wanted in _protocol(run).items():
        if found.get(name) != wanted:
            raise DataError(
                f"{path} was run with {name} {found.get(name)}, and the protocol says {wanted}: move it away, and the"
                " run is made anew"
            )
    return Result(
        arm=found["arm"],
        seed=found["seed"],
        steps=found["steps"],
        evaluations={int(step): score for step, score in found["evaluations"].items()},
    )


def _protocol(run: Run) -> dict[str, Any]:
    made = {
        "settings": dataclasses.asdict(run.arm.settings(run.seed)),
        "rollout": dataclasses.asdict(run.arm.rollout),
        "num_steps": run.num_steps,
    }
    return json.loads(json.dumps(made))
