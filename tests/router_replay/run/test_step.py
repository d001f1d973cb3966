"""A run's step files: what is written is what is read, and what does not fit is refused by name."""

from __future__ import annotations

import gzip
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from router_replay.errors import DataError, InputError
from router_replay.mismatch import Responses
from router_replay.run import RunStep, find_files, read_run, read_step, write_step
from tests.router_replay.report.runs import LINE, NAMES, RECORDED, masks, run_step, write_lines, write_run


def _assert_same(one: RunStep, other: RunStep) -> None:
    assert (one.step, one.moe_layers) == (other.step, other.moe_layers)
    assert one.rollout_logprobs.equal(other.rollout_logprobs)
    assert one.responses.mask.equal(other.responses.mask)
    assert one.responses.cu_seqlens.equal(other.responses.cu_seqlens)
    assert one.responses.group_ids == other.responses.group_ids
    for mine, theirs in ((one.trainer_logprobs, other.trainer_logprobs), (one.weights, other.weights)):
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine)
    assert (one.routes and one.routes.agreement()) == (other.routes and other.routes.agreement())


@pytest.mark.parametrize("routes", [True, False])
def test_a_step_is_read_as_it_was_written(tmp_path: Path, routes: bool):
    step = run_step(12, routes=routes)
    step = replace(step, weights={"applied": torch.rand(len(step.responses.mask))})
    path = write_step(tmp_path / "made" / "here", step)
    assert path.name == "step-00000012.safetensors"
    assert list(path.parent.iterdir()) == [path]
    backwards = {name: step.trainer_logprobs[name] for name in reversed(NAMES)}
    again = read_step(write_step(tmp_path, replace(step, trainer_logprobs=backwards)))
    assert list(again.trainer_logprobs) == list(reversed(NAMES))
    _assert_same(read_step(path), step)
    assert path.stat().st_size < 50_000


def test_groups_are_stored_only_if_they_are_given(tmp_path: Path):
    grouped = run_step(12)
    step = replace(grouped, responses=Responses.packed(grouped.responses.mask, grouped.responses.cu_seqlens))
    path = write_step(tmp_path, step)
    assert "group_ids" not in safetensors.torch.load_file(path)
    _assert_same(read_step(path), step)
    made = RunStep.of(
        0,
        rollout_logprobs=step.rollout_logprobs,
        trainer_logprobs=step.trainer_logprobs,
        responses=step.responses,
    )
    assert made.responses.group_ids is None and made.responses.groups is None
    write_step(tmp_path, run_step(12), part=1)
    with pytest.raises(DataError, match="one has group ids not given, another for its sequences"):
        list(read_run(find_files([tmp_path])))


def test_a_prompts_name_is_the_same_number_in_every_part(tmp_path: Path):
    logprobs = torch.full((2,), -1.0)
    for part, names in enumerate((["a", "b"], ["b", "c"])):
        responses = Responses.packed(torch.ones(2), [0, 1, 2], names)
        record = RunStep.of(0, rollout_logprobs=logprobs, trainer_logprobs=logprobs, responses=responses)
        write_step(tmp_path, record, part=part)
    (joined,) = read_run(find_files([tmp_path]))
    assert joined.responses.prompts.num_segments == 3
    write_lines(tmp_path / "run.jsonl", {**LINE, "group": "b", "step": 0})
    (line,) = read_run([tmp_path / "run.jsonl"])
    assert line.responses.group_ids is not None and line.responses.group_ids[0] in joined.responses.group_ids


def test_raw_routes_in_a_file_are_counted(tmp_path: Path):
    step = run_step(0, routes=False)
    own = torch.arange(4, dtype=torch.uint8).repeat(240, 2, 1)
    other = own.clone()
    other[100, 1, 0] = 7
    other[200:] = 7
    path = write_step(tmp_path, step)
    tensors = safetensors.torch.load_file(path)
    tensors |= {"trainer_routes": own, "rollout_routes": other, "routes_valid": torch.arange(240) < 200}
    safetensors.torch.save_file(tensors, path, {"format": "r3_run_step", "format_version": "1", "step": "0"})
    found = read_step(path)
    assert found.routes is not None and found.moe_layers is None
    assert found.routes.agreement().num_tokens == 200
    assert found.routes.agreement().differing_by_layer == (0.0, 1 / 200)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    earlier = write_step(tmp_path, run_step(1)).read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_step(tmp_path, run_step(1, scale=0.5))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [earlier]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_follow_the_umask(tmp_path: Path, mask: int, mode: int):
    before = os.umask(mask)
    try:
        path = write_step(tmp_path, run_step(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_parts_of_ranks_are_one_step(tmp_path: Path):
    whole = run_step(4)
    rows = [slice(0, 100), slice(100, 240)]
    for part, (tokens, sequences) in enumerate(zip(rows, (slice(0, 5), slice(5, 12)), strict=True)):
        bounds = whole.responses.cu_seqlens[sequences.start : sequences.stop + 1] - tokens.start
        write_step(
            tmp_path,
            RunStep(
                4,
                whole.rollout_logprobs[tokens],
                {name: values[tokens] for name, values in whole.trainer_logprobs.items()},
                Responses.packed(whole.responses.mask[tokens], bounds, whole.responses.group_ids[sequences]),
            ),
            part=part,
        )
    files = find_files([tmp_path])
    assert [path.name for path in files] == ["step-00000004.part-0001.safetensors", "step-00000004.safetensors"]
    for order in (files, files[::-1]):
        (found,) = read_run(order)
        _assert_same(found, replace(whole, routes=None, moe_layers=None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.jsonl", b'{"step": 1,\n', "line 1: not JSON"),
        ("run.jsonl", b"[1]\n", "line 1: a list, not a JSON object"),
        ("run.jsonl", b"\n\n", "holds no line"),
        ("run.jsonl", b"\xff\xfe", "cannot be read"),
        ("run.jsonl.gz", gzip.compress(b'{"step": 1}\n' * 100)[:-12], "cannot be read|lacks the key"),
        ("run.jsonl.gz", b"not gzip", "cannot be read"),
        ("run.safetensors", b"1234", "not a whole safetensors file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_run([path]))
    assert str(path) in str(caught.value)


def _routes_counts(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if name.startswith("route_counts.")}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"routes_valid": torch.ones(240)}, {}, "routes_valid is of rollout_routes, which are not given"),
        ({}, {"format": "pt"}, "a safetensors file of format 'pt', not 'r3_run_step'"),
        ({}, {"format_version": "3"}, "format version '3'; this release reads the versions 1 and 2"),
        ({}, {"step": "one"}, "step and part must be integers"),
        ({}, {"moe_layers": "[1]"}, "names 1 decoder layers, the routes have 3"),
        ({}, {"moe_layers": "[1"}, "contradicts itself"),
        ({}, {"top_k": ""}, "contradicts itself"),
        ({"response_mask": None}, {}, "lacks response_mask; it has"),
        ({"trainer_logprobs.own routes": None, "trainer_logprobs.replayed": None}, {}, "lacks trainer_logprobs.NAME"),
        ({"routes_vaild": torch.ones(1)}, {}, r"unknown tensors \['routes_vaild'\]; known are"),
        ({"rollout_logprobs": torch.ones(7)}, {}, r"rollout_logprobs \[7\] and the response mask \[240\]"),
        ({"rollout_logprobs": torch.ones(240, dtype=torch.int32)}, {}, "must be floating point, got torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 7])}, {}, "must rise from 0 to the mask's 240 tokens"),
        ({"group_ids": torch.tensor([0, 7])}, {}, "2 group ids are given for 12 sequences: one for each"),
        ({"route_counts.shared": None}, {}, "counts of routes need"),
        ({"route_counts.differing": torch.ones(2, dtype=torch.int64)}, {}, r"must be \[1\], \[1\], \[L\] and \[L\]"),
        (
            {"trainer_routes": torch.ones(240, 3, 1).int(), "rollout_routes": torch.ones(240, 3, 1).int()},
            {},
            "routes are given twice",
        ),
    ],
)
def test_a_wrong_step_file_is_named(tmp_path: Path, tensors: dict, metadata: dict, message: str):
    path = write_step(tmp_path, run_step(0))
    found = {**safetensors.torch.load_file(path), **tensors}
    with safetensors.safe_open(path, "pt") as file:
        fields = {**file.metadata(), **metadata}
    kept = {name: value for name, value in found.items() if value is not None}
    safetensors.torch.save_file(kept, path, fields)
    with pytest.raises(DataError, match=message) as caught:
        list(read_run([path]))
    assert str(path) in str(caught.value)


def test_files_of_a_run(tmp_path: Path):
    folder = write_run(tmp_path / "run", 2)
    (folder / ".step-00000002.77.safetensors").write_text("being written")
    (folder / "notes.txt").write_text("not ours")
    files = find_files([folder])
    assert [path.name for path in files] == ["step-00000000.safetensors", "step-00000001.safetensors"]
    seen: list[Path] = []
    assert [step.step for step in read_run([*files[::-1], files[0]], seen.append)] == [0, 1]
    assert seen == files
    for paths, message in (
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([folder / "notes.txt"], "notes.txt: a file of a run ends with .safetensors, .jsonl, .jsonl.gz"),
        ([tmp_path], "a folder without a file of a run"),
    ):
        with pytest.raises(DataError, match=message):
            find_files(paths)


def test_two_runs_are_not_mixed(tmp_path: Path):
    one, other = write_run(tmp_path / "one", 1), write_run(tmp_path / "other", 1)
    with pytest.raises(DataError, match="both hold part 0 of step 0: make one report for each run"):
        list(read_run(find_files([one, other])))


def test_parts_with_other_layers_are_refused(tmp_path: Path):
    write_step(tmp_path, run_step(0, layers=3))
    write_step(tmp_path, run_step(0, layers=2), part=1)
    with pytest.raises(DataError, match=re.escape("step 0: parts of step 0 route in different decoder layers: (1,")):
        list(read_run(find_files([tmp_path])))


def test_what_a_trainer_hands_over_is_checked():
    logprobs = torch.full((4,), -1.0)
    whole = Responses.packed(torch.ones(4), [0, 4])

    def grouped(*ids: object) -> Responses:
        return Responses.packed(torch.ones(4), [0, 4], ids)

    for arguments, options, message in (
        ((logprobs, {}, whole), {}, "no log-probabilities of the trainer"),
        ((logprobs, logprobs, grouped(0.5)), {}, "a group id must be an integer or a string, got 0.5"),
        ((logprobs, logprobs, grouped(2**70)), {}, "group ids must fit into 64 bits"),
        ((logprobs, logprobs[None], whole), {}, r"trainer_logprobs.trainer \[1, 4\] and the response mask \[4\]"),
        ((logprobs, logprobs, whole), {"rollout_masks": []}, "0 rollout masks for 1 sequences"),
        ((logprobs, logprobs, whole), {"rollout_masks": [masks(0, 3)]}, "routes of one side only"),
        (
            (logprobs, logprobs, whole),
            {"rollout_masks": [masks(0, 3)], "rollout_routes": RECORDED},
            "the rollout's routes are given twice",
        ),
        ((logprobs.numpy(), logprobs, whole), {}, "rollout_logprobs must be a torch.Tensor, got numpy.ndarray"),
        ((logprobs, [-1.0] * 4, whole), {}, "trainer_logprobs.trainer must be a torch.Tensor, got list"),
        ((logprobs, {"old": logprobs.numpy()}, whole), {}, "trainer_logprobs.old must be a torch.Tensor, got numpy"),
        ((logprobs, logprobs, whole), {"weights": {"tis": [1.0]}}, "weights.tis must be a torch.Tensor, got list"),
        ((logprobs, logprobs, torch.ones(4)), {}, r"responses must be a Responses, got a tensor \[4\]"),
        (
            (logprobs[None], logprobs[None], Responses.padded(torch.ones(1, 4))),
            {},
            r"must be packed, got a padded mask \[1, 4\]: leave the padding out",
        ),
    ):
        rollout, trainer, responses = arguments
        with pytest.raises(InputError, match=message):
            RunStep.of(0, rollout_logprobs=rollout, trainer_logprobs=trainer, responses=responses, **options)
    with pytest.raises(InputError, match="must rise from 0 to the mask's 4 tokens"):
        Responses.packed(torch.ones(4), [0, 3])
    with pytest.raises(InputError, match="a part's number is 0 or more, got -1"):
        write_step(Path("nowhere"), run_step(0), part=-1)


def test_a_pass_has_its_log_ratios():
    step = run_step(0)
    found = step.log_ratios(NAMES[1])
    assert found.responses is step.responses
    assert found.token.equal((step.trainer_logprobs[NAMES[1]] - step.rollout_logprobs) * step.responses.mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 1.5}, "step is a float"),
        ({"step": True}, "step is a bool"),
        ({"rollout_masks": [{"store": "inline:"}] * 12}, "masks of sequence 0 are a dict"),
        ({"trainer_routes": [[1]]}, r"trainer_routes must be an int tensor \[N, L, K\], got a list"),
    ],
)
def test_what_a_step_is_not_made_of(change, message):
    step = run_step(0)
    given = {
        "step": 0,
        "rollout_logprobs": step.rollout_logprobs,
        "trainer_logprobs": dict(step.trainer_logprobs),
        "responses": step.responses,
        **change,
    }
    with pytest.raises(InputError, match=message):
        RunStep.of(given.pop("step"), **given)


def test_only_a_step_is_written(tmp_path):
    with pytest.raises(InputError, match="the step to write is None, but must be a RunStep"):
        write_step(tmp_path, None)
    assert not list(tmp_path.iterdir())
