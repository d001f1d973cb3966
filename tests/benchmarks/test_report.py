"""`python -m benchmarks.report`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks.report.__main__ import main

APP = typer.Typer()
APP.command()(main)


def test_report_benchmark_prints_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    few = ("--steps", "3", "--tokens", "4000", "--different", "2", "--rounds", "1")
    result = CliRunner().invoke(APP, [*few, "--json", str(file)])
    assert result.exit_code == 0, (result.output, result.exception)
    figures = json.loads(file.read_text())
    assert (figures["steps"], figures["tokens"]) == (3, 4000)
    whole, tallies = figures["write_step"].values()
    assert whole["bytes"] > tallies["bytes"] + 4000 * 12
    assert figures["report"]["wall"] > 0 < figures["report"]["cpu"]
    assert "r3 report of the run" in result.output
