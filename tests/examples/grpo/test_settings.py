"""What makes two runs the same, and what a step can be made of."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from examples.grpo.rollouts import problems_of_step
from examples.grpo.settings import Settings, SettingsError, same_settings
from tests.house.repository import ROOT


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    model = Path("checkpoint")
    same_settings(tmp_path / "run", Settings(), model)
    same_settings(tmp_path / "run", Settings(), model)
    with pytest.raises(SettingsError, match=r"other settings \(routes R3 and now own, seed 0 and now 1\)"):
        same_settings(tmp_path / "run", replace(Settings(), routes="own", seed=1), model)
    with pytest.raises(SettingsError, match="model checkpoint and now other"):
        same_settings(tmp_path / "run", Settings(), Path("other"))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 0


def test_minibatches_are_of_whole_microbatches() -> None:
    with pytest.raises(SettingsError, match=r"64 conversations \(8 problems x 8\) cannot be cut into 3 minibatches"):
        Settings(minibatches=3)
    with pytest.raises(SettingsError, match="2 minibatches of whole microbatches of 24"):
        Settings(microbatch=24)


def test_a_run_from_before_there_was_a_setting_goes_on_with_its_default(tmp_path: Path) -> None:
    same_settings(tmp_path, Settings(), Path("checkpoint"))
    path = tmp_path / "settings.json"
    before = json.loads(path.read_text())
    del before["score_centering"]
    path.write_text(json.dumps(before))
    same_settings(tmp_path, Settings(), Path("checkpoint"))
    with pytest.raises(SettingsError, match="score_centering 0 and now 8"):
        same_settings(tmp_path, Settings(score_centering=8), Path("checkpoint"))


def test_scores_of_whole_responses_are_not_centred() -> None:
    with pytest.raises(SettingsError, match=r"of 8 .*, and GSPO has one ratio .*: choose GRPO, or"):
        Settings(score_centering=8, algorithm="GSPO")
    with pytest.raises(SettingsError, match="and not -1"):
        Settings(score_centering=-1)


@pytest.mark.parametrize("operations", [(4, 2), (1, 3), (3, 5)])
def test_problems_that_there_are_none_of_are_refused(operations: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match="choose two numbers of 2 to 4, the smaller one first"):
        Settings(operations=operations)


def test_a_steps_problems_are_different_and_follow_from_seed_and_step() -> None:
    settings = Settings(problems=200, operations=(2, 3), microbatch=1)
    found = problems_of_step(settings, 3)
    assert len(set(found)) == 200 and {len(each.steps) for each in found} == {2, 3}
    assert found == problems_of_step(settings, 3)
    assert found != problems_of_step(settings, 4) and found != problems_of_step(replace(settings, seed=1), 3)


def test_conversations_are_dropped_by_names_that_there_are() -> None:
    assert Settings(drop=("cut-off", "one-reward")).drop == ("cut-off", "one-reward")
    with pytest.raises(SettingsError, match="named one-reward, cut-off, bad-call, and not overlong"):
        Settings(drop=("cut-off", "overlong"))


def test_the_command_line_says_what_does_not_fit() -> None:
    command = [sys.executable, "-m", "examples.grpo", "--microbatch=24", "--drop=cut-off", "--drop=bad-call"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "choose numbers" in run.stderr and "Traceback" not in run.stderr
