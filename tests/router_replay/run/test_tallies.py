"""A step's tallies say what its tokens say, to every reader that asks for no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from router_replay.errors import DataError, InputError
from router_replay.mismatch import Responses
from router_replay.report.summary import RunSummary, summarize
from router_replay.report.table import rows, warnings
from router_replay.run import Dynamics, RunStep, find_files, read_run, read_step, read_tallies, write_step
from router_replay.run.step_tally import OF_GROUPS, StepTally
from tests.router_replay.report.runs import NAMES, run_step, write_lines

METROPOLIS = "Metropolis, sequences"
DYNAMICS = Dynamics(reward=0.5, num_responses=12)


def steps() -> list[RunStep]:
    made = [run_step(number, zeros=number) for number in (0, 1, 5)]
    weights = torch.linspace(0, 2, 240, dtype=torch.float64)
    return [replace(each, weights={"mine": weights}, dynamics=DYNAMICS) for each in made]


def parts_of(step: RunStep, cuts: tuple[int, ...]) -> list[RunStep]:
    """The step's twelve sequences of 20 tokens, cut before some of them; routes are the first part's."""
    parts = []
    for first, last in zip((0, *cuts), (*cuts, 12), strict=True):
        tokens = slice(20 * first, 20 * last)
        assert step.responses.group_ids is not None
        parts.append(
            RunStep(
                step.step,
                step.rollout_logprobs[tokens],
                {name: values[tokens] for name, values in step.trainer_logprobs.items()},
                Responses.packed(
                    step.responses.mask[tokens],
                    range(0, 20 * (last - first) + 1, 20),
                    step.responses.group_ids[first:last],
                ),
                routes=step.routes if first == 0 else None,
                moe_layers=step.moe_layers if first == 0 else None,
                weights={name: values[tokens] for name, values in step.weights.items()},
                dynamics=step.dynamics if first == 0 else None,
            )
        )
    return parts


def assert_same(one: RunSummary, other: RunSummary, *, same_draws: bool = True) -> None:
    """All figures and words, up to rounding.

    Args:
        same_draws: the Metropolis chains, which are drawn for each batch anew, went over the same batches.
    """
    assert rows(one) == rows(other) and warnings(one) == warnings(other)
    assert one.dynamics == other.dynamics and one.routes == other.routes
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert mine.step == theirs.step and mine.effective_shares == pytest.approx(theirs.effective_shares)
        for name in mine.passes:
            assert mine.passes[name].flat() == pytest.approx(theirs.passes[name].flat())
    for name, mine in one.passes.items():
        theirs = other.passes[name]
        assert mine.diagnostics.ratio_tails == theirs.diagnostics.ratio_tails
        assert mine.sample.total == theirs.sample.total
        # Of tokens of probability 0, all alike, any may be first.
        assert sorted(mine.sample.extremes.tolist()) == sorted(theirs.sample.extremes.tolist())
        assert sorted(mine.sample.points.tolist()) == sorted(theirs.sample.points.tolist())
        assert mine.corrections.keys() == theirs.corrections.keys()
        pairs = [(mine.corrections[title], theirs.corrections[title]) for title in mine.corrections]
        if not same_draws:
            here, there = pairs.pop(list(mine.corrections).index(METROPOLIS))
            assert here.total.tokens == there.total.tokens
        for here, there in [*pairs, (one.weights["mine"], other.weights["mine"])]:
            assert (here.total.tokens, here.total.kept) == (there.total.tokens, there.total.kept)
            assert here.total.cells.equal(there.total.cells)
            assert here.total.effective_share == pytest.approx(there.total.effective_share)
            assert here.lowest == pytest.approx(there.lowest)


@pytest.mark.parametrize("cuts", [(), (4,), (4, 8)])
@pytest.mark.parametrize("tokens", [True, False])
def test_the_report_is_the_same_with_tallies_and_with_tokens(tmp_path: Path, cuts: tuple[int, ...], tokens: bool):
    for step in steps():
        for number, part in enumerate(parts_of(step, cuts)):
            write_step(tmp_path, part, part=number, tokens=tokens)
    found = list(read_tallies(find_files([tmp_path])))
    assert_same(summarize(found), summarize(steps()), same_draws=not cuts)
    assert [len(each.passes) for each in found] == [2, 2, 2]
    assert list(summarize(read_tallies(find_files([tmp_path]), passes=NAMES[1:]), passes=NAMES[1:]).passes) == [
        NAMES[1]
    ]


def test_no_token_is_read_where_tallies_say_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in steps():
        write_step(tmp_path, step)
    files = find_files([tmp_path])
    read: list[Path] = []
    monkeypatch.setattr("router_replay.run.reading.read_step", lambda path: read.append(path) or read_step(path))
    list(read_tallies(files, taus=(1.01, 2.0)))
    assert read == []
    found = list(read_tallies(files, taus=(1.3,)))
    assert read == files and found[0].passes[NAMES[0]].tally.taus.count(1.3) == 1
    summarize(found, taus=(1.3,))


def without_tallies(path: Path) -> None:
    """Make of a file one as release 0.1 wrote it."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "format_version": "1"}
    del metadata["tally"]
    tensors = {name: each for name, each in safetensors.torch.load_file(path).items() if not name.startswith("tally.")}
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("old", [slice(0, 3), slice(1, 2)])
def test_files_of_earlier_releases_are_read(tmp_path: Path, old: slice):
    paths = [write_step(tmp_path, step) for step in steps()]
    for path in paths[old]:
        without_tallies(path)
    assert [step.step for step in read_run(paths)] == [0, 1, 5]
    assert_same(summarize(read_tallies(paths)), summarize(steps()))


def other_form(path: Path) -> None:
    """Make of a file one of a release that counts something else."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["tally"] = metadata["tally"].replace('"log_ratio"', '"log_ratio_cubed"')
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)


def test_tallies_of_another_form_are_not_taken_for_these(tmp_path: Path):
    paths = [write_step(tmp_path, step) for step in steps()]
    other_form(paths[1])
    assert_same(summarize(read_tallies(paths)), summarize(steps()))
    other_form(write_step(tmp_path, steps()[1], tokens=False))
    with pytest.raises(DataError, match=r"step-00000001.*has the tallies of step 1 and not its tokens"):
        list(read_tallies(paths))


def test_prompts_in_several_parts_are_compared_by_their_tokens_or_not_at_all(tmp_path: Path):
    (step,) = steps()[:1]
    for number, part in enumerate(parts_of(step, (5,))):
        write_step(tmp_path, part, part=number)
    files = find_files([tmp_path])
    assert_same(summarize(read_tallies(files)), summarize([step]))
    for number, part in enumerate(parts_of(step, (5,))):
        write_step(tmp_path, part, part=number, tokens=False)
    (tally,) = read_tallies(files)
    assert not {*OF_GROUPS} & {*tally.passes[NAMES[0]].corrections}
    # Of another step they are known, and would not compare with those of all steps.
    files.append(write_step(tmp_path, steps()[1], tokens=False))
    found, whole = summarize(read_tallies(files)), summarize(steps()[:2])
    for name in NAMES:
        assert found.passes[name].corrections.keys() == whole.passes[name].corrections.keys() - {*OF_GROUPS}
    (warning,) = set(warnings(found)) - set(warnings(whole))
    assert "several parts of step 0" in warning and all(f"“{name}”" in warning for name in OF_GROUPS)
    assert not found.groups_of_one


def test_one_response_a_rank_is_no_group_of_one(tmp_path: Path):
    for part in range(2):
        step = RunStep.of(0, rollout_logprobs=torch.full((2,), -1.0), trainer_logprobs=torch.full((2,), -1.5),
                          responses=Responses.packed(torch.ones(2), [0, 2], [7]))  # fmt: skip
        write_step(tmp_path, step, part=part, tokens=False)
    (found,) = read_tallies(find_files([tmp_path]))
    assert (found.largest_group, found.num_tokens) == (2, 4)


def test_without_tokens_other_taus_are_refused(tmp_path: Path):
    write_step(tmp_path, steps()[0], tokens=False)
    with pytest.raises(DataError, match=r"has no tokens, and its tallies no F\(tau\) of tau 1.3: ask for 1.01, 1.1, "):
        list(read_tallies(find_files([tmp_path]), taus=(1.3, 2.0)))
    with pytest.raises(DataError, match=r"has the tallies of step 0 and not its tokens, which write_step\(tokens=Fal"):
        list(read_run(find_files([tmp_path])))


@pytest.mark.parametrize("tokens", [True, False])
def test_a_step_with_a_bad_token_keeps_its_reason_and_its_dynamics(tmp_path: Path, tokens: bool):
    good, bad, _ = steps()
    bad = replace(bad, trainer_logprobs={**bad.trainer_logprobs, NAMES[1]: torch.full((240,), float("nan"))})
    paths = [write_step(tmp_path, each, tokens=tokens) for each in (good, bad)]
    found = summarize(read_tallies(paths))
    assert [each.step for each in found.steps] == [0]
    assert found.left_out == summarize([good, bad]).left_out
    assert found.dynamics == {0: DYNAMICS, 1: DYNAMICS}
    asked = summarize(read_tallies(paths, passes=NAMES[:1]), passes=NAMES[:1])
    assert len(asked.left_out) == (0 if tokens else 1)


def test_a_step_of_which_a_part_is_refused_is_refused():
    good, bad = (StepTally.of(part) for part in parts_of(steps()[0], (4,)))
    bad = replace(bad, passes={}, weights={}, refused="a bad token")
    for parts in ([good, bad], [bad, good]):
        joined = StepTally.join(parts)
        assert (joined.refused, joined.passes, joined.weights) == ("a bad token", {}, {})


def test_a_file_without_tokens_has_none(tmp_path: Path):
    found = safetensors.torch.load_file(write_step(tmp_path, steps()[0], tokens=False))
    assert {name.partition(".")[0] for name in found} == {"tally", "route_counts"}


def test_a_step_without_response_tokens_is_empty(tmp_path: Path):
    good, empty, _ = steps()
    empty = replace(empty, responses=empty.responses.keep(torch.zeros(240, dtype=torch.bool)))
    evaluated = RunStep.without_tokens(7, Dynamics(evaluation=0.5))
    paths = [write_step(tmp_path, each, tokens=False) for each in (good, empty, evaluated)]
    found = summarize(read_tallies(paths))
    assert found.empty_steps == (1,) and [each.step for each in found.steps] == [0]
    assert list(found.dynamics) == [0, 1, 7]


def test_lines_and_tallies_of_one_step_are_joined(tmp_path: Path):
    (step,) = steps()[:1]
    step = replace(step, weights={}, responses=Responses.packed(step.responses.mask, step.responses.cu_seqlens))
    write_step(tmp_path, step, tokens=False)
    line = {"step": 0, "rollout_logprobs": [-1.0, -2.0], "response_mask": [1, 1],
            "trainer_logprobs": {name: [-1.5, -2.0] for name in NAMES}}  # fmt: skip
    write_lines(tmp_path / "more.jsonl", line)
    (found,) = read_tallies(find_files([tmp_path]))
    assert found.num_tokens == 170 and int(found.passes[NAMES[0]].tally.counts[0]) == 170


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: replace(step, weights={}), r"one has weights \['mine'\], another \[\]"),
        (lambda step: replace(step, trainer_logprobs={"new": step.rollout_logprobs}), "one has trainer_logprobs"),
        (lambda step: replace(step, responses=Responses.packed(step.responses.mask, step.responses.cu_seqlens)),
         "one has group ids for its sequences, another not given"),
        (lambda step: replace(step, step=4), r"parts of the steps \[0, 4\] do not fit"),
        (lambda step: replace(step, moe_layers=(7, 8, 9)), r"different decoder layers: \(1, 2, 3\) and \(7, 8, 9\)"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_as_their_tokens_are(change: Callable[[RunStep], RunStep], message: str):
    step = steps()[0]
    for join, parts in (
        (RunStep.join, [step, change(step)]),
        (StepTally.join, [StepTally.of(step), StepTally.of(change(step))]),
    ):
        with pytest.raises(InputError, match=message):
            join(parts)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {f"tally.counts.{NAMES[0]}": torch.zeros(3, dtype=torch.int64)}, "other lengths than their names"),
        ({}, {f"tally.cells.{NAMES[0]}": None}, "tally.cells|cells.own routes"),
        ({}, {f"tally.corrections.{NAMES[0]}": torch.zeros(2, 5)}, "zip"),
        ({"tally": "{"}, {}, "contradicts itself"),
        ({"moe_layers": "[1]"}, {}, "moe_layers names 1 decoder layers, the routes have 3"),
    ],
)
def test_tallies_that_contradict_themselves_are_named(tmp_path: Path, metadata: dict, tensors: dict, message: str):
    path = write_step(tmp_path, steps()[0], tokens=False)
    with safetensors.safe_open(path, "pt") as file:
        fields = {**file.metadata(), **metadata}
    found = {**safetensors.torch.load_file(path), **tensors}
    safetensors.torch.save_file({name: each for name, each in found.items() if each is not None}, path, fields)
    with pytest.raises(DataError, match=f"step 0 contradicts itself: .*({message})|{re.escape(message)}") as caught:
        list(read_tallies([path]))
    assert str(path) in str(caught.value)


def test_tallies_are_small(tmp_path: Path):
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.rand(count, generator=generator)
    step = RunStep.of(0, rollout_logprobs=rollout,
                      trainer_logprobs=rollout + 0.05 * torch.randn(count, generator=generator),
                      responses=Responses.packed(torch.ones(count), range(0, count + 1, 1000)))  # fmt: skip
    assert write_step(tmp_path, step, tokens=False).stat().st_size < 400_000
