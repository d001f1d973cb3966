"""The checker itself: it passes what the reference's own passes chose, and sees each kind of wrong row."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.small_model import CHECKPOINT
from tests.soak.answers import ORIGINS, Answer
from tests.soak.checker import Checker
from tests.soak.checkpoints import Checkpoints, make_checkpoints
from tests.soak.oracle import Oracle, routes_of
from tests.soak.tally import Tally
from tests.soak.weights import WeightHistory

_TOKENS = 60


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return make_checkpoints(CHECKPOINT, tmp_path_factory.mktemp("checkpoints"), 3, seed=0)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CHECKPOINT, longest=128)


@pytest.fixture
def checker(oracle: Oracle, checkpoints: Checkpoints) -> Checker:
    history = WeightHistory()
    history.begin("second", 1)
    history.done()
    return Checker(oracle, checkpoints, history, Tally())


def _answer(folder: Path, name: str, seed: int = 0) -> Answer:
    """What a server with these weights would say."""
    ids = torch.randint(103, (_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    experts = routes_of(folder, ids[:-1])
    num = len(experts)
    now = time.monotonic()
    origins = torch.full((num,), ORIGINS.index("computed"))
    meta = {"num_retractions": 0, "cached_tokens": 0}
    return Answer(ids, 0, experts, torch.ones(num, dtype=torch.bool), [name] * num, origins, now, now, meta)


def test_right_rows_pass_under_each_checkpoint(checker: Checker, checkpoints: Checkpoints) -> None:
    checker.history.begin("third", 2)
    answers = [_answer(folder, name, seed=n) for n, (folder, name) in enumerate(
        zip(checkpoints.folders, ("default", "second", "third"), strict=True)
    )]  # fmt: skip
    # One and two are over; their rows came from the cache.
    answers[0] = replace(answers[0], origins=torch.full_like(answers[0].origins, ORIGINS.index("device")))
    checker.check([*answers[:1], *answers[2:]])
    assert checker.tally.wrong.total() == 0
    assert checker.tally.faults == []
    assert checker.tally.rows == {"device": 59, "computed": 59, "host": 0, "storage": 0, "retracted": 0}
    assert checker.tally.distinct == 59
    assert not torch.equal(answers[0].experts[:, -1], _answer(checkpoints.folders[1], "", 0).experts[:, -1])


@pytest.mark.parametrize(
    "kind", ["the next token's row", "one expert", "layers exchanged", "other weights", "an expert twice", "zeros"]
)
def test_wrong_rows_are_seen(checker: Checker, checkpoints: Checkpoints, kind: str) -> None:
    answer = _answer(checkpoints.folders[1], "second")
    experts = answer.experts.clone()
    if kind == "the next token's row":
        experts[20] = experts[21]
    elif kind == "one expert":
        experts[20, 2, 0] = next(e for e in range(32) if e not in experts[20, 2])
    elif kind == "layers exchanged":
        experts[20, [1, 2]] = experts[20, [2, 1]]
    elif kind == "other weights":
        experts[20] = _answer(checkpoints.folders[2], "second").experts[20]
    elif kind == "an expert twice":
        experts[20, 1, 0] = experts[20, 1, 1]
    else:
        experts[20] = 0
    checker.check([replace(answer, experts=experts)])
    # No other row is blamed for it.
    assert checker.tally.wrong.total() == 1
    assert "token 20: computed, version 'second'" in checker.tally.faults[0]


def test_rows_that_are_not_valid_are_counted_and_not_wrong(checker: Checker, checkpoints: Checkpoints) -> None:
    answer = _answer(checkpoints.folders[1], "second")
    answer.experts[20] = -1
    answer.valid[20] = False
    checker.check([answer])
    assert checker.tally.invalid.total() == 1
    assert checker.tally.faults == []


def test_rows_under_a_name_that_is_over_are_seen(checker: Checker, checkpoints: Checkpoints) -> None:
    time.sleep(0.01)
    checker.check([_answer(checkpoints.folders[0], "default")])
    assert checker.tally.wrong.total() == 0
    assert "rows of version 'default' were computed when it was not in force" in checker.tally.faults[0]


def test_a_name_that_nobody_gave_is_that_of_one_checkpoint(checker: Checker, checkpoints: Checkpoints) -> None:
    checker.history.begin(None, 2)
    checker.history.begin(None, 0)
    checker.check([_answer(checkpoints.folders[2], "+1")])
    assert checker.tally.faults == []
    assert checker.history.checkpoints["+1"] == 2
    checker.check([_answer(checkpoints.folders[0], "+1", seed=1)])
    assert checker.tally.wrong.total() == 59
