"""`python -m benchmarks.mask_codec`, as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.mask_codec import before
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


def test_a_codec_is_compared_with_that_of_a_folder() -> None:
    """With itself, here."""
    figures = before.compare(str(before.ROOT), 3, 1, 1)
    assert list(figures) == ["Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3-Next-80B"]
    for runs in figures.values():
        assert list(runs) == ["pack", "unpack", "unpack, layer by layer", "both"]
        assert all(taken[which].wall > 0 for taken in runs.values() for which in ("before", "now"))


def test_what_is_no_codec_to_compare_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="neither a folder nor a commit"):
        before.compare("no-such-commit", 3, 1, 1)
    with pytest.raises(typer.BadParameter, match=f"{re.escape(str(tmp_path))} holds no package router_replay"):
        before.compare(str(tmp_path), 3, 1, 1)


def test_a_codec_that_writes_other_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "router_replay" / "masks").mkdir(parents=True)
    (tmp_path / "router_replay" / "__init__.py").touch()
    (tmp_path / "router_replay" / "masks" / "__init__.py").touch()
    codecs = tmp_path / "router_replay" / "masks" / "codecs"
    codecs.mkdir()
    (codecs / "__init__.py").touch()
    (codecs / "ops.py").write_text(
        """
import torch

class OPS:
    pack = staticmethod(lambda routes, experts, codec: torch.zeros(len(routes), 9, dtype=torch.uint8))
    unpack_indices = staticmethod(lambda rows, *geometry: rows)

MISSING_KERNELS = {}
"""
    )
    with pytest.raises(typer.BadParameter, match="writes other rows of Qwen3-30B-A3B than this codec"):
        before.compare(str(tmp_path), 3, 1, 1)
