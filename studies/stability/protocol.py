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

REVISION = 1
"""Raised by hand when the code makes another run of the same settings: results of before are refused then."""

STEPS = 100
SEEDS = (1, 2, 3)
"""Seed 0 was the pilot's."""
PIECE = 10
"""Steps that a run goes on for before another one's turn, so that a slow hour of the machine is slow for all arms."""

EXACT = RolloutWeights()
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
    evaluation_problems=256,
)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and file names.
        changes: of `BASE`.
        rollout: what the rollout engine is given of the weights.
        start: what training starts from is made of the checkpoint in the same way.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rollout: RolloutWeights = MISMATCH
    start: RolloutWeights = EXACT

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
        return f"{self.arm.name.replace(', ', '-')}-{self.seed}"


FIRST = (
    Arm("control", rollout=EXACT),
    Arm("nothing"),
    Arm("TIS", {"correction": "TIS"}),
    Arm("R3", {"routes": "R3"}),
)
LATER = (
    # As bad a sampler as the others have, and no mismatch.
    Arm("control, moved", rollout=EXACT, start=MISMATCH),
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
