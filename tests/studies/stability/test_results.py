"""A run's file says what was run and seen, and the page's tables and picture are made of such files."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from router_replay.errors import DataError, InputError
from studies.stability import page, plots, results, work
from studies.stability.protocol import ARMS, Run


def lines_of(rewards: list[float], evaluations: dict[int, float], k3: float) -> list[dict]:
    """As the loop writes them."""
    figures = dict.fromkeys(results.KEPT.values(), 0.5) | {"mismatch/k3": k3, "mismatch/f_tau/2": k3 / 10}
    made = [
        {"step": step, **figures, "reward": reward, "seconds": {"rollout": 5.0, "update": step / 100}}
        for step, reward in enumerate(rewards, start=1)
    ]
    lines = [{"step": 0}, *made]
    for step, score in evaluations.items():
        lines[step]["evaluation"] = score
    return lines


RISING = [0.2 + step / 200 for step in range(100)]
FALLING = [0.4] * 20 + [0.05] * 80
SCORES = {0: 0.4, 20: 0.5, 40: 0.1, 60: 0.0, 80: 0.0, 100: 0.1}


@pytest.fixture
def folder(tmp_path):
    for seed, k3 in ((1, 3e-3), (2, 1e-3), (3, 2e-3)):
        lines = lines_of(FALLING, SCORES, k3)
        results.write(Run(ARMS["nothing"], seed), lines, tmp_path)
    results.write(
        Run(ARMS["control"], 1),
        lines_of(RISING, {0: 0.4, 20: 0.45, 40: 0.6, 60: 0.6, 80: 0.6, 100: 0.5}, 0.0),
        tmp_path,
    )
    return tmp_path


def test_what_is_written_is_read(folder):
    found = results.read(Run(ARMS["nothing"], 1), folder)
    assert found is not None
    assert found.series("reward") == FALLING and found.series("k3") == [3e-3] * 100
    assert found.series("seconds")[6] == pytest.approx(5.07)
    assert found.evaluations == SCORES and found.best == (0.5, 20)
    # Of three low ones and two of before the mean is 0.19, below half of 0.4.
    assert found.collapse == 23
    control = results.read(Run(ARMS["control"], 1), folder)
    assert control is not None and control.collapse is None and control.best == (0.6, 40)
    assert results.read(Run(ARMS["R3"], 1), folder) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("settings", {"learning_rate": 1.0}),
        ("rollout", {"router_offset": 0.1}),
        ("start", {"router_offset": 0.1}),
        ("num_steps", 7),
        ("checkpoint", "0" * 64),
        ("revision", 0),
    ],
)
def test_a_result_of_another_protocol_is_no_result_of_this_one(folder, name, change):
    run = Run(ARMS["nothing"], 1)
    path = results.path_of(run, folder)
    found = json.loads(path.read_text())
    found[name] = found[name] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=name):
        results.read(run, folder)


def test_the_table_has_medians_and_what_lies_between_all_runs(folder):
    rows = [line.strip("| ").split(" | ") for line in page.table(folder).splitlines()]
    of_arm = {cells[0]: cells for cells in rows}
    assert of_arm["nothing"][1:5] == ["3", "23, 23, 23", "0.500 (0.500 to 0.500)", "20, 20, 20"]
    assert of_arm["nothing"][5] == "0.100 (0.100 to 0.100)" and of_arm["nothing"][7] == "0.002 (0.001 to 0.003)"
    assert of_arm["control"][1:8] == ["1", "none", "0.600", "40", "0.500", "0.672", "0"]
    assert of_arm["R3"][1:3] == ["0", "not run"]
    scores = page.evaluations(folder)
    assert "| nothing | 0.400 (0.400 to 0.400) | 0.500 (0.500 to 0.500) |" in scores
    assert f"*4 of {3 * len(ARMS)} runs" in scores


def test_what_was_published_stands_beside_what_was_seen(folder):
    rows = [line.strip("| ").split(" | ") for line in page.beside(folder).splitlines()]
    assert rows[2] == [
        "nothing",
        "GRPO, one update a step",
        "62.23",
        "60",
        "0.500 (0.500 to 0.500)",
        "0.100 (0.100 to 0.100)",
        "23, 23, 23",
    ]
    assert {cells[0] for cells in rows[2:]} <= ARMS.keys()
    assert all(cells[-1] == "not run" for cells in rows[3:])


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_picture_is_drawn_of_what_is_there(folder, tmp_path, name):
    plots.draw(tmp_path / name, plots.PICTURES[name], folder)
    assert imread(tmp_path / name).std() > 0.01


def test_every_arm_is_in_a_picture():
    assert {arm.name for arms in plots.PICTURES.values() for arm in arms} == ARMS.keys()


def test_a_picture_has_room_for_all_arms(tmp_path):
    for arm in ARMS.values():
        results.write(Run(arm, 1), lines_of(FALLING, SCORES, 1e-3), tmp_path / "results")
    plots.draw(tmp_path / "all.png", tuple(ARMS.values()), tmp_path / "results")
    drawn = imread(tmp_path / "all.png")
    # A legend that is wider than the picture is cut at its edges.
    assert all((edge == 1).all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["steps"].pop(),
        lambda found: found["steps"][3].pop("k3"),
        lambda found: found["evaluations"].pop("40"),
    ],
    ids=["a step", "a figure", "an evaluation"],
)
def test_a_result_that_is_not_whole_is_refused(folder, damage):
    run = Run(ARMS["nothing"], 1)
    path = results.path_of(run, folder)
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="not whole"):
        results.read(run, folder)


def test_a_run_that_failed_is_a_result_of_the_steps_before(folder, tmp_path):
    run = Run(ARMS["R2"], 1)
    lines = lines_of(FALLING[:30], {0: 0.4, 20: 0.5}, 1e-3)
    results.write(run, lines, folder, failed="InputError: the gradient of step 31 has the norm inf")
    found = results.read(run, folder)
    assert found is not None and found.failed is not None and len(found.steps) == 30 and found.last == 0.5
    assert "| R2 | 1 | failed at 31 |" in page.table(folder)
    assert "| R2 | 0.400 | 0.500 |  |  |  |  |" in page.evaluations(folder)
    plots.draw(tmp_path / "stability.png", tuple(ARMS.values()), folder)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_ends_a_run_is_its_result_from_its_first_step_on(tmp_path, monkeypatch, steps):
    def train(*_, **others):
        (tmp_path / run.name / "figures.jsonl").write_text("".join(f'{{"step": {each}}}\n' for each in range(steps)))
        raise InputError("the gradient has the norm inf")

    run = Run(ARMS["nothing"], 1)
    monkeypatch.setitem(sys.modules, "examples.grpo.loop", SimpleNamespace(train=train))
    monkeypatch.setitem(sys.modules, "cpu_engines.megatron.qwen3_moe", SimpleNamespace(hf_tensors=lambda model: {}))
    if steps < 2:
        # Its first score, at step 0, is of the weights that it was given.
        with pytest.raises(InputError, match="the norm inf"):
            work._go_on(run, 10, None, None, "", tmp_path)
    else:
        assert work._go_on(run, 10, None, None, "", tmp_path) == "InputError: the gradient has the norm inf"


def test_a_run_whose_last_step_is_done_still_comes_to_its_result(tmp_path):
    run = Run(ARMS["nothing"], 1)
    (tmp_path / run.name).mkdir()
    lines = lines_of(FALLING, SCORES, 1e-3)
    (tmp_path / run.name / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert work.steps_done(run, tmp_path, tmp_path / "results") == 99
    results.write(run, lines, tmp_path / "results")
    assert work.steps_done(run, tmp_path, tmp_path / "results") == 100


@pytest.mark.parametrize("text", ["", "[]", '{"settings": '])
def test_what_is_no_result_is_refused(folder, text):
    run = Run(ARMS["nothing"], 1)
    results.path_of(run, folder).write_text(text)
    with pytest.raises(DataError, match="move it away"):
        results.read(run, folder)


def test_a_run_that_failed_in_its_first_step_is_named_and_nothing_more(folder, tmp_path):
    results.write(Run(ARMS["R2"], 1), lines_of([], {0: 0.4}, 1e-3), folder, failed="InputError: NaN")
    assert "| R2 | 1 | failed at 1 |  |" in page.table(folder)
    plots.draw(tmp_path / "stability.png", tuple(ARMS.values()), folder)
