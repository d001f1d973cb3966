"""A run's JSON lines, with routes and with the masks of the rollout's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from router_replay.errors import DataError
from router_replay.masks import RoutingMasks, compare_routes
from router_replay.masks.stores.inline import InlineStore
from router_replay.mismatch import Responses
from router_replay.run import RunStep, find_files, read_run, write_step
from tests.router_replay.report.runs import LINE, OWN, RECORDED, masks, run_step, write_lines

RAW = {"rollout_routes": RECORDED.tolist(), "trainer_routes": OWN.tolist(), "routes_valid": [1, 1, 1, 0]}


@pytest.mark.parametrize("name", ["run.jsonl", "run.jsonl.gz"])
def test_json_lines_made_by_hand(tmp_path: Path, name: str):
    second = {
        **LINE,
        "trainer_logprobs": {"new": [-1.0], "old": [-1.0]},
        "rollout_logprobs": [-1],
        "response_mask": [1],
    }
    extra = {"reward": 1.0, "text": "not ours"}
    path = write_lines(
        tmp_path / name,
        {**LINE, **RAW, **extra, "group": "a", "moe_layers": [0, 2], "weights": {"tis": [0, 1, 1, 0.5]}},
        {**LINE, "step": 1, "trainer_logprobs": [-1.0, -1.0, -1.0, float("-inf")]},
        {**second, "group": "b", "weights": {"tis": [2]}},
    )
    first, third = read_run([path])
    assert (first.step, list(first.trainer_logprobs), first.routes) == (1, ["trainer"], None)
    assert first.responses.group_ids is None
    assert first.trainer_logprobs["trainer"].tolist()[3] == -float("inf")
    assert third.step == 3
    assert third.responses.cu_seqlens.tolist() == [0, 4, 5]
    assert third.rollout_logprobs[1:].tolist() == [-1.5, -0.25, -2.0, -1.0]
    assert third.trainer_logprobs["new"].tolist() == [0.0, -1.25, -0.25, -3.0, -1.0]
    assert third.weights["tis"].tolist() == [0, 1, 1, 0.5, 2]
    assert third.responses.mask.tolist() == [False, True, True, True, True]
    assert third.responses.groups.num_segments == 2
    assert third.moe_layers == (0, 2)
    assert third.routes is not None
    assert third.routes.agreement() == compare_routes(trainer=OWN[:3], rollout=RECORDED[:3])
    assert third.routes.agreement().differing_by_layer == (1 / 3, 1 / 3)


@pytest.mark.parametrize("side", ["rollout_routes", "trainer_routes"])
@pytest.mark.parametrize("valid", [{}, {"routes_valid": [1, 0, 1, 1]}])
def test_routes_of_minus_one_are_not_known(tmp_path: Path, side: str, valid: dict):
    sides = {"rollout_routes": RECORDED.tolist(), "trainer_routes": OWN.tolist()}
    sides[side][3] = [[-1, -1], [-1, -1]]
    (found,) = read_run([write_lines(tmp_path / "run.jsonl", {**LINE, **sides, **valid})])
    kept = torch.tensor([0, 2] if valid else [0, 1, 2])
    assert found.routes is not None
    assert found.routes.agreement() == compare_routes(trainer=OWN[kept], rollout=RECORDED[kept])
    sides[side][3] = [[-1, -1], [0, 1]]
    with pytest.raises(DataError, match=r"line 1: the .* routes have experts below 0"):
        list(read_run([write_lines(tmp_path / "run.jsonl", {**LINE, **sides, **valid})]))


@pytest.mark.parametrize("cut", [3, 1])
def test_masks_of_the_answer_are_taken_as_they_are(tmp_path: Path, cut: int):
    """One handle, or those of two turns; the last token has no row."""
    parts = [masks(0, 3)] if cut == 3 else [masks(0, cut), masks(cut, 3)]
    path = write_lines(
        tmp_path / "run.jsonl",
        {**LINE, "rollout_masks": [InlineStore().put(part) for part in parts], "trainer_routes": OWN.tolist()},
    )
    (found,) = read_run([path])
    assert found.routes is not None and found.moe_layers == (0, 2)
    assert found.routes.agreement() == compare_routes(trainer=OWN[:3], rollout=RECORDED[:3])


def test_masks_in_memory_are_compared_in_the_same_way():
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    own = torch.cat([OWN, OWN[:1]])
    step = RunStep.of(0, rollout_logprobs=logprobs, trainer_logprobs=logprobs,
                      responses=Responses.packed(torch.ones(5), [0, 4, 5]),
                      rollout_masks=[masks(0, 3), masks(0, 1)], trainer_routes=own)  # fmt: skip
    assert step.routes is not None and step.moe_layers == (0, 2)
    compared = torch.tensor([0, 1, 2, 4])
    assert step.routes.agreement() == compare_routes(
        trainer=own[compared], rollout=RECORDED[torch.tensor([0, 1, 2, 0])]
    )


def _handles(*parts: RoutingMasks) -> list[dict]:
    return [InlineStore().put(part) for part in parts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "3"}, "line 2: 'step' must be an integer, got '3'"),
        ({"step": -1}, "line 2: a step's number is 0 or more, got -1"),
        ({"rollout_logprobs": [-1.0]}, r"line 2: rollout_logprobs \[1\] and the response mask \[4\]"),
        ({"trainer_logprobs": [-1.0]}, r"line 2: trainer_logprobs.trainer \[1\] and the response mask \[4\]"),
        ({"trainer_logprobs": {"old": [[1]]}}, "line 2: 'trainer_logprobs' of 'old' must be a list of numbers"),
        ({"trainer_logprobs": {}}, "line 2: no log-probabilities of the trainer"),
        ({"rollout_logprobs": ["-1"]}, "line 2: 'rollout_logprobs' must be a list of numbers"),
        ({"response_mask": [0, 1, 2, 0]}, "line 2: a response mask must be bool, or hold 0 and 1"),
        ({"group": 1.5}, "line 2: 'group' must be an integer or a string, got 1.5"),
        ({"weights": [1.0]}, "line 2: 'weights' must be an object of lists by name"),
        ({"weights": {"tis": [1.0]}}, r"line 2: weights.tis \[1\] and the response mask \[4\]"),
        ({"trainer_routes": OWN.tolist()}, "line 2: routes of one side only"),
        ({**RAW, "trainer_routes": OWN[:3].tolist()}, r"trainer_routes \[3, 2, 2\] must have one row for each"),
        ({**RAW, "rollout_routes": RECORDED[:, :1].tolist()}, r"\[4, 2, 2\] and rollout routes \[4, 1, 2\]"),
        ({**RAW, "rollout_routes": [[0, 1]]}, r"\[layers\]\[top-k\] integers, got \[1, 2\]"),
        ({**RAW, "rollout_routes": [[[0], [1, 2]]]}, r"'rollout_routes' must be \[tokens\]\[layers\]"),
        ({**RAW, "routes_valid": [1, 1]}, r"valid \[2\] must have one entry for each token, \[4\]"),
        ({**RAW, "routes_valid": [1, None, 1, 1]}, "line 2: 'routes_valid' must hold 0 and 1"),
        ({"routes_valid": [1, 1, 1, 1]}, "line 2: 'routes_valid' is of 'rollout_routes', which the line lacks"),
        ({**RAW, "moe_layers": 5}, "line 2: 'moe_layers' must be a list of integers, got 5"),
        ({"group": 10**30}, "line 2: group ids must fit into 64 bits"),
        ({"rollout_logprobs": [-(10**400), 1, 1, 1]}, "line 2: .*too large"),
        ({**RAW, "moe_layers": [0]}, "moe_layers names 1 decoder layers, the routes have 2"),
        ({**RAW, "rollout_masks": _handles(masks(0, 3))}, "given twice: 'rollout_masks' and 'rollout_routes'"),
        ({"rollout_masks": [], "trainer_routes": OWN.tolist()}, "'rollout_masks' is an empty list"),
        ({"rollout_masks": [{"store": "elsewhere"}]}, "line 2: not a handle of a known store"),
        ({"rollout_masks": _handles(masks(0, 2), masks(1, 3))}, "masks 1 has rows for tokens that masks before it"),
        (
            {"rollout_masks": _handles(masks(0, 4)), "response_mask": [1], "rollout_logprobs": [-1]},
            r"masks cover tokens \[0, 4\), but the sequence has 1 tokens",
        ),
        ({"rollout_logprob": []}, "line 2: unknown key 'rollout_logprob'; rename it, to 'rollout_logprobs'"),
        ({"routes_vaild": [1]}, "line 2: unknown key 'routes_vaild'; rename it, to 'routes_valid'"),
        ({"trainer_logprobs": {"old": [-1.0] * 4}}, r"one has trainer_logprobs \['new', 'old'\], another \['old'\]"),
        ({"group": 1}, "line 2: some lines of step 3 have the key 'group' and others not"),
        ({"weights": {"tis": [1.0] * 4}}, r"one has weights \[\], another \['tis'\]"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, changes: dict, message: str):
    path = write_lines(tmp_path / "run.jsonl", LINE, {**LINE, **changes})
    with pytest.raises(DataError, match=message) as caught:
        list(read_run([path]))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["step", "rollout_logprobs", "trainer_logprobs", "response_mask"])
def test_a_missing_key_is_named(tmp_path: Path, key: str):
    path = write_lines(tmp_path / "run.jsonl", {name: value for name, value in LINE.items() if name != key})
    with pytest.raises(DataError, match=f"line 1: lacks the key '{key}'; it has"):
        list(read_run([path]))


def test_lines_of_several_files_in_one_step_are_told(tmp_path: Path):
    first = write_lines(tmp_path / "a.jsonl", LINE, LINE, {**LINE, "step": 4})
    second = write_lines(tmp_path / "b.jsonl", LINE, {**LINE, "step": 5})
    logprobs = torch.tensor([-1.0])
    written = write_step(
        tmp_path,
        RunStep.of(
            5,
            rollout_logprobs=logprobs,
            trainer_logprobs={"old": logprobs, "new": logprobs},
            responses=Responses.packed(torch.ones(1), [0, 1]),
        ),
    )
    for files, expected in (
        ([first, second], [(3, (first, second))]),
        ([written, second, first], [(3, (second, first)), (5, (second, written))]),
        ([first, first], []),
    ):
        told: list[tuple[int, tuple[Path, ...]]] = []
        list(read_run(files, on_shared=lambda step, paths: told.append((step, paths))))  # noqa: B023
        assert told == expected
    # Parts of one step say of themselves that they are.
    for part in (0, 1):
        write_step(tmp_path / "parts", run_step(0), part=part)
    list(read_run(find_files([tmp_path / "parts"]), on_shared=lambda step, paths: pytest.fail("parts of a step")))
