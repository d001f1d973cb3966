"""What makes two runs the same, and what a step can be made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.grpo.settings import Settings, same_settings


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    model = Path("checkpoint")
    same_settings(tmp_path / "run", Settings(), model)
    same_settings(tmp_path / "run", Settings(), model)
    with pytest.raises(ValueError, match=r"other settings \(routes R3 and now own, seed 0 and now 1\)"):
        same_settings(tmp_path / "run", replace(Settings(), routes="own", seed=1), model)
    with pytest.raises(ValueError, match="model checkpoint and now other"):
        same_settings(tmp_path / "run", Settings(), Path("other"))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 0


def test_minibatches_are_of_whole_microbatches() -> None:
    with pytest.raises(ValueError, match=r"64 conversations \(8 problems x 8\) cannot be cut into 3 minibatches"):
        Settings(minibatches=3)
    with pytest.raises(ValueError, match="2 minibatches of whole microbatches of 24"):
        Settings(microbatch=24)
