"""What is run, written down before it was: arms, their order, the mismatch, the settings, and when a run has collapsed.

The collapse rule is `router_replay.run.collapse.find_collapse` on the steps' mean rewards, with its defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.grpo.settings import Settings
from studies.stability.rollout_weights import RolloutWeights

STEPS = 100
SEEDS = (0, 1, 2)
PIECE = 10
"""Steps that a run goes on for before another one's turn, so that a slow hour of the machine is slow for all arms."""

MISMATCH = RolloutWeights(router_offset=2.0)
"""Of every arm but the control: what the rollout engine is given in place of the trainer's weights."""

BASE = Settings(
    routes="own",
    correction="none",
    problems=8,
    group_size=8,
    operations=(3, 4),
    minibatches=2,
    microbatch=32,
    learning_rate=1e-4,
    evaluate_every=20,
)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and file names.
        changes: of `BASE`.
        rollout: what the rollout engine is given of the weights.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rollout: RolloutWeights = MISMATCH

    def settings(self, seed: int) -> Settings:
        """Of the arm's run by a seed: problems are the same in every arm."""
        return dataclasses.replace(BASE, seed=seed, **self.changes)


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    arm: Arm
    seed: int
    num_steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"


FIRST = (
    Arm("control", rollout=RolloutWeights()),
    Arm("nothing"),
    Arm("TIS", {"correction": "TIS"}),
    Arm("R3", {"routes": "R3"}),
)
LATER = (
    Arm("MIS", {"correction": "MIS"}),
    Arm("R2", {"routes": "R2"}),
    Arm("R3+TIS", {"routes": "R3", "correction": "TIS"}),
    Arm("GSPO", {"algorithm": "GSPO"}),
    Arm("GSPO+R3", {"algorithm": "GSPO", "routes": "R3"}),
    Arm("centering", {"score_centering": 32}),
)
ARMS = {arm.name: arm for arm in (*FIRST, *LATER)}


def blocks() -> list[list[Run]]:
    """Runs that take turns, block after block: whenever the study is stopped, what is finished can be compared."""
    first = [[Run(arm, seed) for arm in FIRST] for seed in SEEDS]
    return [*first, *([Run(arm, seed) for arm in LATER] for seed in SEEDS)]
