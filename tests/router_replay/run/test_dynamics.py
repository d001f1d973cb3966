"""What a step says of training: typed, joined from parts, and the same in a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import DataError, InputError
from router_replay.mismatch import Responses
from router_replay.run import Dynamics, RunStep, find_files, read_run, read_step, write_step
from tests.router_replay.report.runs import run_step

ALL = Dynamics(
    num_responses=64,
    reward=0.25,
    response_length=117.5,
    longest_response=512,
    cut_off=0.125,
    num_tokens=7520,
    entropy=1.5,
    clipped=0.01,
    dropped=0.0,
    dropped_responses=3,
    dropped_groups=1,
    effective_share=0.875,
    route_drift=0.03,
    route_overlap=0.99,
    gradient_norm=0.7,
    evaluation=0.5,
    seconds=12.25,
)


def same(one: Dynamics | None, other: Dynamics | None) -> bool:
    # NaN is not equal to itself.
    return repr(one) == repr(other)


@pytest.mark.parametrize(
    "dynamics",
    [
        None,
        Dynamics(),
        ALL,
        Dynamics(reward=-2.0, evaluation=0.0),
        Dynamics(reward=math.nan, gradient_norm=math.inf, evaluation=-math.inf, entropy=math.nan, seconds=math.inf),
    ],
)
def test_a_step_is_read_with_its_figures(tmp_path: Path, dynamics: Dynamics | None):
    path = write_step(tmp_path, replace(run_step(3), dynamics=dynamics))
    found = read_step(path)
    assert same(found.dynamics, dynamics) and len(found.trainer_logprobs) == 2
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert ("dynamics" in metadata) == (dynamics is not None)
    if dynamics is not None:

        def refuse(constant: str):
            raise AssertionError(f"{constant} is not JSON")

        parsed = json.loads(metadata["dynamics"], parse_constant=refuse)
        assert parsed.keys() == {name for name, value in asdict(dynamics).items() if value is not None}


def test_every_figure_is_in_the_example():
    assert all(getattr(ALL, each.name) is not None for each in fields(Dynamics))


def test_of_takes_them(tmp_path: Path):
    step = run_step(3)
    made = RunStep.of(3, rollout_logprobs=step.rollout_logprobs, trainer_logprobs=step.trainer_logprobs,
                      responses=step.responses, dynamics=ALL)  # fmt: skip
    assert made.dynamics == ALL and read_step(write_step(tmp_path, made)).dynamics == ALL


def test_a_step_may_be_without_tokens(tmp_path: Path):
    only = RunStep.without_tokens(0, Dynamics(evaluation=0.5))
    write_step(tmp_path, only)
    write_step(tmp_path, RunStep.without_tokens(1, Dynamics(evaluation=0.75)))
    write_step(tmp_path, run_step(1), part=1)
    first, second = read_run(find_files([tmp_path]))
    assert (first.dynamics, len(first.responses.mask), first.trainer_logprobs) == (only.dynamics, 0, {})
    assert second.dynamics == Dynamics(evaluation=0.75)
    assert second.rollout_logprobs.equal(run_step(1).rollout_logprobs)
    nothing = Responses.packed(torch.zeros(0), [0, 0])
    with pytest.raises(InputError, match="no log-probabilities of the trainer"):
        RunStep(0, torch.zeros(0), {}, nothing)
    with pytest.raises(InputError, match="no log-probabilities of the trainer"):
        RunStep(0, torch.zeros(4), {}, Responses.packed(torch.ones(4), [0, 4]), dynamics=ALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": torch.tensor(0.5)}, r"reward must be a number, got a Tensor: float\(reward\)"),
        ({"reward": True}, "reward must be a number, got a bool"),
        ({"entropy": -0.1}, "entropy is 0 or more, got -0.1"),
        ({"gradient_norm": -math.inf}, "gradient_norm is 0 or more, got -inf"),
        ({"clipped": 1.5}, "clipped is a share, from 0 to 1, got 1.5"),
        ({"effective_share": math.nan}, "effective_share is a share, from 0 to 1, got nan: leave it out"),
        ({"num_tokens": 1.0}, "num_tokens is a float"),
        ({"dropped_groups": -1}, "dropped_groups is a number of things, 0 or more, got -1"),
    ],
)
def test_what_is_no_figure_is_refused(given: dict, message: str):
    with pytest.raises(InputError, match=message):
        Dynamics(**given)
    with pytest.raises(InputError, match="dynamics is a dict"):
        replace(run_step(0), dynamics=given)


def test_numbers_of_numpy_are_written(tmp_path: Path):
    dynamics = Dynamics(num_responses=np.int64(3), reward=np.float64(0.5))
    assert read_step(write_step(tmp_path, RunStep.without_tokens(0, dynamics))).dynamics == dynamics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"reward": 1', "the figures of the step are no JSON"),
        ("[1]", r"figures of a step are an object of num_responses, .*; got \[1\]"),
        ('{"rewards": 1}', r"figures of a step are .*; got \['rewards'\]"),
        ('{"reward": "much"}', "reward must be a number, got a str"),
        ('{"clipped": 2}', "clipped is a share"),
    ],
)
def test_a_file_with_other_figures_is_named(tmp_path: Path, text: str, message: str):
    path = write_step(tmp_path, replace(run_step(0), dynamics=ALL))
    with safetensors.safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "dynamics": text}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    with pytest.raises(DataError, match=f"step-00000000.*contradicts itself: {message}"):
        read_step(path)


def test_parts_are_the_whole_step():
    parts = [
        Dynamics(num_responses=3, reward=1.0, response_length=10.0, longest_response=12, cut_off=0.0, num_tokens=30,
                 entropy=1.0, clipped=0.1, dropped_groups=1, seconds=3.0, evaluation=0.5),
        Dynamics(num_responses=1, reward=0.0, response_length=30.0, longest_response=30, cut_off=1.0, num_tokens=10,
                 entropy=2.0, clipped=0.3, dropped_groups=2, seconds=4.0, gradient_norm=math.nan),
        Dynamics(gradient_norm=math.nan),
        Dynamics(num_responses=0, reward=math.nan, num_tokens=0),
    ]  # fmt: skip
    whole = Dynamics(num_responses=4, reward=0.75, response_length=15.0, longest_response=30, cut_off=0.25,
                     num_tokens=40, entropy=1.25, clipped=(0.1 * 30 + 0.3 * 10) / 40, dropped_groups=3, seconds=4.0,
                     evaluation=0.5, gradient_norm=math.nan)  # fmt: skip
    assert same(Dynamics.join(parts), whole)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"evaluation": 0.5}, {"evaluation": 0.25}, "evaluation 0.5 and 0.25: it is of the whole step"),
        ({"gradient_norm": math.nan}, {"gradient_norm": 1.0}, "gradient_norm nan and 1.0: it is of the whole step"),
        ({"reward": 0.5}, {"reward": 0.5, "num_responses": 2}, "have reward, and one of them not num_responses"),
        ({"entropy": 0.5, "num_tokens": 2}, {"entropy": 0.5}, "have entropy, and one of them not num_tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, one: dict, other: dict, message: str):
    for part, each in enumerate((one, other)):
        write_step(tmp_path, replace(run_step(0), dynamics=Dynamics(**each)), part=part)
    with pytest.raises(DataError, match=f"step 0: parts of one step have? .*{message.removeprefix('have ')}"):
        list(read_run(find_files([tmp_path])))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), min_size=1, max_size=6))
def test_a_joined_mean_is_that_of_all(pairs: list[tuple[int, float]]):
    joined = Dynamics.join([Dynamics(num_tokens=count, dropped=value) for count, value in pairs])
    items = [value for count, value in pairs for _ in range(count)]
    assert joined.num_tokens == len(items)
    if len(pairs) == 1:
        assert joined.dropped == pairs[0][1]
    else:
        assert joined.dropped == (pytest.approx(sum(items) / len(items)) if items else None)
