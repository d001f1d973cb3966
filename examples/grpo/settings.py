"""Settings of a run: what its results depend on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from examples.calculator.game import FEWEST_OPERATIONS, MOST_OPERATIONS
from router_replay.files import write_whole

Routes = Literal["own", "R3", "R2"]
"""Whose routes the trainer takes: its own in each pass; the rollout's; those of its own pass over the old weights."""

Correction = Literal["none", "TIS", "MIS"]
"""Of the sampler's distribution: truncated or masked importance sampling of tokens (`router_replay.mismatch`)."""


DROPS = ("one-reward", "cut-off", "bad-call")
"""Conversations that are not learned from: of groups of one reward; that hit a limit; with a call that was none."""


class SettingsError(ValueError):
    """Settings of which no run can be made, or not in this folder."""


@dataclass(frozen=True)
class Settings:
    """Of a run; two runs with the same settings differ by nothing but the rollout's own randomness.

    Attributes:
        algorithm: whose loss is taken.
        routes: that the trainer takes.
        correction: weights of the loss.
        score_centering: how many of the sampler's most probable tokens centre the scores of the loss; 0 for none.
        drop: which conversations leave before advantages are made: names of `DROPS`.
        problems: different ones in a step.
        group_size: conversations about each.
        operations: fewest and most of a problem.
        minibatches: optimizer steps on a step's conversations.
        microbatch: conversations in one forward pass.
        learning_rate: after the warm-up.
        warmup: optimizer steps in which the rate rises; a step counts as its minibatches, whatever filters leave of it.
        clip_gradient: largest norm of a gradient.
        evaluate_every: steps between evaluations on held-out problems; there is one before the first step, too.
        evaluation_problems: held-out problems, the same each time, which are answered greedily.
        seed: chooses problems.
    """

    algorithm: Literal["GRPO", "GSPO"] = "GRPO"
    routes: Routes = "R3"
    correction: Correction = "none"
    score_centering: int = 0
    drop: tuple[str, ...] = ()
    problems: int = 8
    group_size: int = 8
    operations: tuple[int, int] = (2, 4)
    minibatches: int = 2
    microbatch: int = 16
    learning_rate: float = 1e-4
    warmup: int = 10
    clip_gradient: float = 1.0
    evaluate_every: int = 10
    evaluation_problems: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        conversations = self.problems * self.group_size
        if conversations % (self.minibatches * self.microbatch):
            raise SettingsError(
                f"{conversations} conversations ({self.problems} problems x {self.group_size}) cannot be cut into"
                f" {self.minibatches} minibatches of whole microbatches of {self.microbatch}: choose numbers of"
                " minibatches and of conversations in a microbatch whose product divides them"
            )
        unknown = [each for each in self.drop if each not in DROPS]
        if unknown:
            raise SettingsError(f"conversations to drop are named {', '.join(DROPS)}, and not {', '.join(unknown)}")
        if self.score_centering < 0:
            raise SettingsError(f"score_centering is a number of tokens, 0 for none, and not {self.score_centering}")
        if self.score_centering and self.algorithm != "GRPO":
            raise SettingsError(
                f"a score_centering of {self.score_centering} centres scores token by token, and {self.algorithm} has"
                " one ratio for a whole response: choose GRPO, or a score_centering of 0"
            )
        fewest, most = self.operations
        if not FEWEST_OPERATIONS <= fewest <= most <= MOST_OPERATIONS:
            raise SettingsError(
                f"no problem has {fewest} to {most} operations: choose two numbers of {FEWEST_OPERATIONS} to"
                f" {MOST_OPERATIONS}, the smaller one first"
            )


def same_settings(folder: Path, settings: Settings, model: Path) -> None:
    """Write a run's settings into its folder, or see that a run that goes on has the same.

    Raises:
        SettingsError: the folder holds a run with other settings.
    """
    path = folder / "settings.json"
    wanted: dict[str, Any] = {"model": str(model), **dataclasses.asdict(settings)}
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        write_whole(path, lambda partial: partial.write_text(json.dumps(wanted, indent=2) + "\n"))
        return
    # A run from before there was a setting has its default.
    found = json.loads(json.dumps(dataclasses.asdict(Settings()))) | json.loads(path.read_text())
    differing = {
        name: (found.get(name), wanted.get(name)) for name in found | wanted if found.get(name) != wanted.get(name)
    }
    if differing:
        said = ", ".join(f"{name} {before} and now {now}" for name, (before, now) in sorted(differing.items()))
        raise SettingsError(
            f"{folder} holds a run with other settings ({said}): take another folder, or those it began with"
        )
