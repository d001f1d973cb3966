"""`python -m benchmarks.capture`, as a user runs it; what it starts is tested by every other test of a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.capture.figures import targets
from benchmarks.capture.serving import AGAIN, MASKS, OFF, SGLANG, STOCK
from benchmarks.interleaved import Seconds
from tests.house.repository import ROOT
from tests.small_model import cpu_environment

pytestmark = pytest.mark.timeout(900)


def test_pause_is_measured_and_written(tmp_path: Path) -> None:
    file = tmp_path / "capture.json"
    command = [sys.executable, "-m", "benchmarks.capture", "--pause-only", "--pause-tokens=2048", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(file.read_text())
    assert {"date", "hardware", "versions", "settings", "targets"} <= figures.keys()
    assert figures["pause"].keys() == {STOCK, MASKS, SGLANG}
    assert all(taken["wall"] > 0 for taken in figures["pause"].values())
    assert "when a request of 2,048 tokens" in run.stdout


def test_a_server_may_differ_from_stock_by_what_it_differs_from_itself() -> None:
    pause = {STOCK: Seconds(2.0, 1.0), MASKS: Seconds(1.0, 1.5)}
    serving = {name: {"cpu_of_off": ratio, "error": 0.01} for name, ratio in ((OFF, 1.0), (AGAIN, 1.02), (STOCK, 1.1))}
    aims = targets({**serving, MASKS: {"cpu_of_off": 1.13, "error": 0.01}}, pause)
    assert [aim["holds"] for aim in aims.values()] == [False, True]
    aims = targets({**serving, MASKS: {"cpu_of_off": 1.14, "error": 0.01}}, pause)
    assert [aim["holds"] for aim in aims.values()] == [False, False]
