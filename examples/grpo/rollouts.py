"""A step's conversations: played, checked to be of the weights that were pushed, and kept until the step is over."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from examples.calculator.game import Problem, Split, problems
from examples.grpo.settings import Settings
from examples.multi_turn_replay.rollout import GREEDY, Conversation, RolloutError, play
from router_replay.files import write_whole
from router_replay.masks import load, open_store

_EVALUATION_SEED = 1 << 20


def problems_of_step(settings: Settings, step: int) -> list[Problem]:
    """Those of a step, each of them once: a function of the seed and the step alone."""
    return _some("train", f"{settings.seed}/{step}", settings.problems, settings)


def roll_out(
    url: str,
    settings: Settings,
    step: int,
    version: str,
    tokenizer: PreTrainedTokenizerBase,
    on_finished: Callable[[Conversation], None],
    concurrency: int,
) -> list[Conversation]:
    """A step's conversations, those about one problem one behind the other.

    Raises:
        RolloutError: as of `play`; or the rows that came are not of the weights of this step.
    """
    asked = [each for each in problems_of_step(settings, step) for _ in range(settings.group_size)]
    played = play(
        url,
        asked,
        tokenizer,
        concurrency=concurrency,
        top_logprobs=settings.score_centering,
        on_finished=on_finished,
    )
    _require_version(played, version)
    return played


def evaluate(url: str, settings: Settings, version: str, tokenizer: PreTrainedTokenizerBase, concurrency: int) -> float:
    """Share of the held-out problems that the server's weights solve greedily.

    Raises:
        RolloutError: as of `roll_out`.
    """
    asked = _some("held_out", _EVALUATION_SEED, settings.evaluation_problems, settings)
    played = play(url, asked, tokenizer, concurrency=concurrency, sampling=GREEDY)
    _require_version(played, version)
    return sum(each.correct for each in played) / len(played)


def _require_version(played: Sequence[Conversation], version: str) -> None:
    found = {name for each in played for _, name in each.masks.weight_versions}
    if found != {version}:
        raise RolloutError(
            f"the server was given the weights {version!r}, and the masks name {sorted(found)}: another trainer pushes"
            " weights to it"
        )


def write_rollouts(path: Path, conversations: Sequence[Conversation]) -> None:
    """Keep a step's conversations, a line each: what a run that is killed goes on from."""
    with open_store("inline:") as store:
        lines = [json.dumps({**vars(each), "masks": store.put(each.masks)}) + "\n" for each in conversations]

    def write(partial: Path) -> None:
        with gzip.open(partial, "wt", compresslevel=1) as file:
            file.writelines(lines)

    write_whole(path, write)


def read_rollouts(path: Path) -> list[Conversation]:
    """What `write_rollouts` wrote, to the last bit."""
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = [json.loads(line) for line in file]
    return [Conversation(**{**each, "masks": load(each["masks"])}) for each in found]


def _some(split: Split, seed: int | str, count: int, settings: Settings) -> list[Problem]:
    fewest, most = settings.operations
    fitting = (each for each in problems(split, seed) if fewest <= len(each.steps) <= most)
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[next(fitting)] = None
    return list(found)
