"""A run's file says what was run and seen, and the page's tables and picture are made of such files."""

from __future__ import annotations

import json

import pytest
from matplotlib.image import imread

from router_replay.errors import DataError
from studies.stability import page, plots, results
from studies.stability.protocol import ARMS, Run


def lines_of(rewards: list[float], evaluations: dict[int, float], k3: float) -> list[dict]:
    """As the loop writes them."""
    figures = dict.fromkeys(results.KEPT.values(), 0.5) | {"mismatch/k3": k3, "mismatch/f_tau/2": k3 / 10}
    made = [
        {"step": step, **figures, "reward": reward, "seconds": {"rollout": 5.0, "update": step / 100}}
        for step, reward in enumerate(rewards, start=1)
    ]
    for line in made:
        line.pop("evaluation")
    lines = [{"step": 0}, *made]
    for step, score in evaluations.items():
        lines[step]["evaluation"] = score
    return lines


RISING = [0.2 + step / 200 for step in range(60)]
FALLING = [0.4] * 20 + [0.05] * 40


@pytest.fixture
def folder(tmp_path):
    for seed, k3 in ((0, 1e-3), (1, 3e-3), (2, 2e-3)):
        lines = lines_of(FALLING, {0: 0.4, 20: 0.5, 40: 0.1, 60: 0.0}, k3)
        results.write(Run(ARMS["nothing"], seed), lines, tmp_path)
    results.write(Run(ARMS["control"], 0), lines_of(RISING, {0: 0.4, 20: 0.45, 40: 0.6, 60: 0.6}, 0.0), tmp_path)
    return tmp_path


def test_what_is_written_is_read(folder):
    found = results.read(Run(ARMS["nothing"], 1), folder)
    assert found is not None
    assert found.series("reward") == FALLING and found.series("k3") == [3e-3] * 60
    assert found.series("seconds")[6] == pytest.approx(5.07)
    assert found.evaluations == {0: 0.4, 20: 0.5, 40: 0.1, 60: 0.0} and found.best == (0.5, 20)
    # Of three low ones and two of before the mean is 0.19, below half of 0.4.
    assert found.collapse == 23
    control = results.read(Run(ARMS["control"], 0), folder)
    assert control is not None and control.collapse is None and control.best == (0.6, 40)
    assert results.read(Run(ARMS["R3"], 0), folder) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [("settings", {"learning_rate": 1.0}), ("rollout", {"router_offset": 0.1}), ("num_steps", 7)],
)
def test_a_result_of_another_protocol_is_no_result_of_this_one(folder, name, change):
    run = Run(ARMS["nothing"], 0)
    path = results.path_of(run, folder)
    found = json.loads(path.read_text())
    found[name] = found[name] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match=name):
        results.read(run, folder)


def test_the_table_has_medians_and_what_lies_between_all_runs(folder):
    rows = [line.strip("| ").split(" | ") for line in page.table(folder).splitlines()]
    of_arm = {cells[0]: cells for cells in rows}
    assert of_arm["nothing"][1:6] == [
        "3",
        "23, 23, 23",
        "0.500 (0.500 to 0.500)",
        "20, 20, 20",
        "2.0e-03 (1.0e-03 to 3.0e-03)",
    ]
    assert of_arm["control"][1:6] == ["1", "none", "0.600", "40", "0"]
    assert of_arm["R3"][1] == "not run"
    scores = page.evaluations(folder)
    assert "| nothing | 0.400 (0.400 to 0.400) | 0.500 (0.500 to 0.500) |" in scores
    assert f"*4 of {3 * len(ARMS)} runs" in scores


def test_the_picture_is_drawn_of_what_is_there(folder, tmp_path):
    plots.draw(tmp_path / "stability.png", folder)
    assert imread(tmp_path / "stability.png").std() > 0.01
