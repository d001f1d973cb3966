"""The training script of the small model, for two steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from transformers import AutoTokenizer, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from examples.small_model.train import main
from router_replay.masks import RoutingGeometry

APP = typer.Typer()
APP.command()(main)


def test_two_steps_write_a_whole_checkpoint_with_its_card(tmp_path: Path, small_model: Path) -> None:
    out = tmp_path / "trained"
    arguments = [
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--evaluate-every",
        "2",
        "--final-problems",
        "4",
    ]
    result = CliRunner().invoke(APP, arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]
    written, committed = (json.loads((folder / "config.json").read_text()) for folder in (out, small_model))
    assert written == committed
    geometry = RoutingGeometry.from_hf_config(written)
    assert geometry == RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
    model = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out).encode("1+1")
    # Two steps of a warm-up leave the model about as unsure as it began.
    entropy = torch.distributions.Categorical(logits=model(torch.tensor([ids])).logits).entropy()
    assert entropy.min() > 2
    assert "2 steps of 4 conversations" in (out / "README.md").read_text()


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = CliRunner().invoke(APP, ["--out", str(tmp_path), "--steps", "1"])
    assert result.exit_code == 2
    assert "no checkpoint" in result.output
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
