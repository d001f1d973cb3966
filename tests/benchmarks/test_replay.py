"""`python -m benchmarks.replay`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.house.repository import ROOT


def test_replay_benchmark_prints_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "replay.json"
    few = ("--shape", "DeepSeek-V3", "--tokens", "64", "--layer-tokens", "64", "--hidden", "16", "--rounds", "1")
    # In a process of its own, since it stands in for CUDA and opens a process group.
    command = [sys.executable, "-m", "benchmarks.replay", *few, "--bind-tokens", "512", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(file.read_text())
    assert {"date", "hardware", "versions", "settings"} <= figures.keys()
    titles = {f"DeepSeek-V3, {kind}" for kind in ("routers", "MoE layer", "step")}
    assert figures["times"].keys() == titles | {"Qwen3-MoE of Hugging Face, step"}
    routers = figures["times"]["DeepSeek-V3, routers"]
    operators = {name: taken["operators"] for name, taken in routers.items()}
    # One more than stock's for each of 8 layers: stock's routes lie there unpacked.
    assert operators["replay"] == operators["stock RouterReplay"] + 8 < operators["native"]
    assert operators["native"] == operators["native again"] < operators["replay, 1 % of places native"]
    # 48 layers of 41 bits.
    assert figures["bind"]["bytes_per_token"]["rows"] == 246
    assert all(taken["cpu"] > 0 for taken in figures["bind"]["median_seconds"].values())
    assert "second use" in run.stdout
