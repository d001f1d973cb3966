"""`r3 doctor` with SGLang's own parser: what a server would be refused for, without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_model import cpu_environment

pytestmark = pytest.mark.timeout(900)


def _doctor(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from router_replay_cli.main import main; main()", "doctor"]
    command += ["--model-path", str(model), "--device=cpu", *flags]
    return subprocess.run(command, env=cpu_environment({"COLUMNS": "400"}), capture_output=True, text=True)


def test_a_server_that_would_capture(small_model: Path) -> None:
    result = _doctor(small_model, "--enable-router-capture")
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        "fits SGLang, router capture: ",
        "fits Megatron-Core, replay: ",
        "captures: format masks, codec rank",
        "5 MoE layers of 4 of 32 experts: a row of 10 bytes for each KV slot",
        "nothing refused",
    ):
        assert part in result.stdout


def test_everything_that_would_be_refused_is_told(small_model: Path) -> None:
    result = _doctor(small_model, "--speculative-algorithm=NGRAM", "--use-ray")
    assert result.returncode == 1
    assert "captures nothing: add --enable-router-capture" in result.stdout
    assert "router capture cannot run where --speculative-algorithm is 'NGRAM': " in result.stdout
    assert "router capture cannot run where --use-ray is True: " in result.stdout
