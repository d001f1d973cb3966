"""`python -m benchmarks.mask_codec`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks.mask_codec.__main__ import main

APP = typer.Typer()
APP.command()(main)


def test_codec_benchmark_prints_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    few = ("--tokens", "16", "--speed-tokens", "16", "--rounds", "1")
    result = CliRunner().invoke(APP, ["--model", "OLMoE-1B-7B", *few, "--json", str(file)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert "masks (rank), container" in figures["way_to_the_trainer"]["median_seconds"]
    assert figures["thousand_tokens_per_second"]["models"]["Mixtral-8x7B"].keys() >= {"rank pack", "numpy.packbits"}
    assert figures["bytes_per_token"]["Qwen3-30B-A3B"]["rank"] == 48 * 41 / 8
    assert figures["bytes_per_token"]["Qwen3-30B-A3B"]["ordered"] == 48 * 8 * 7 / 8
    assert {"date", "hardware", "versions"} <= figures.keys()
    assert "Qwen3-30B-A3B" in result.output
