"""`r3 inspect` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from router_replay.masks import RoutingGeometry, RoutingMasks, open_store, save_file
from router_replay_cli.inspect_files import inspect

GEOMETRY = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 4), num_experts=8, top_k=2)
# Positions 3 to 8; in decoder layer 1 expert 5 takes every token, in the others two experts take turns.
INDICES = torch.tensor([[[5, row % 2], [row % 2, 2 + row % 2], [0, 7]] for row in range(6)])
VALID = torch.tensor([True, True, False, False, True, True])


def make_masks(valid: torch.Tensor = VALID) -> RoutingMasks:
    return RoutingMasks.from_indices(
        INDICES,
        valid,
        start=3,
        geometry=GEOMETRY,
        codec="ordered",
        token_ids=range(100, 109),
        weight_versions=((3, "step 1"), (7, "step 2")),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(make_masks(), tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def _run(*arguments: object) -> Result:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(inspect)
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_what_a_file_holds_in_words(path: Path):
    result = _run(path)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        str(path),
        "  tokens        6, positions [3, 9)",
        "  valid         4 (66.67%); unknown: [5, 7)",
        "  model         3 MoE layers of 6, each token goes to 2 of 8 experts",
        "  MoE layers    1 to 2, 4",
        "  codec         ordered, 3 bytes a token, 18 in all",
        "  weights       'step 1' from 3, 'step 2' from 7",
        f"  token digest  {make_masks().token_digest}",
        "  layer  experts used  busiest  its share  times the mean",
        "      1             3        5     50.00%            4.00",
        "      2             4        0     25.00%            2.00",
        "      4             2        0     50.00%            4.00",
    ]
    assert _run(path, "--no-layers").output.splitlines() == result.output.splitlines()[:8]


def test_what_a_file_holds_in_json(path: Path):
    found = json.loads(_run("--json", path).output)
    assert found == {
        "file": str(path),
        "num_tokens": 6,
        "start": 3,
        "end": 9,
        "num_valid": 4,
        "valid_share": 4 / 6,
        "unknown_positions": [[5, 7]],
        "geometry": {"num_layers": 6, "moe_layers": [1, 2, 4], "num_experts": 8, "top_k": 2},
        "codec": "ordered",
        "bytes_per_token": 3,
        "num_bytes": 18,
        "weight_versions": [[3, "step 1"], [7, "step 2"]],
        "token_digest": make_masks().token_digest,
        "expert_load": [
            {"layer": 1, "experts_used": 3, "busiest_expert": 5, "busiest_share": 0.5, "busiest_by_mean": 4.0},
            {"layer": 2, "experts_used": 4, "busiest_expert": 0, "busiest_share": 0.25, "busiest_by_mean": 2.0},
            {"layer": 4, "experts_used": 2, "busiest_expert": 0, "busiest_share": 0.5, "busiest_by_mean": 4.0},
        ],
    }


def test_answers_of_a_server(tmp_path: Path):
    answer = {"text": "", "meta_info": {"routing_masks": [open_store("inline:").put(make_masks())]}}
    for name, content in (("one", answer), ("meta_info", answer["meta_info"]), ("list", [answer, answer])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = _run("--json", *(tmp_path / f"{name}.json" for name in ("one", "meta_info", "list"))).output.splitlines()
    files = [json.loads(line)["file"] for line in lines]
    of_list = [f"{tmp_path / 'list.json'}, answer {number}" for number in (0, 1)]
    assert files == [str(tmp_path / "one.json"), str(tmp_path / "meta_info.json"), *of_list]


@pytest.mark.parametrize("rows", [0, 6])
def test_masks_without_a_valid_row_have_no_load(tmp_path: Path, rows: int):
    masks = make_masks(torch.zeros(6, dtype=torch.bool))[6 - rows :]
    save_file(masks, tmp_path / "masks")
    found = json.loads(_run("--json", tmp_path / "masks").output)
    assert (found["num_tokens"], found["num_valid"], found["expert_load"]) == (rows, 0, [])
    assert found["valid_share"] == (0.0 if rows else None)
    assert found["unknown_positions"] == ([[3, 9]] if rows else [])
    assert _run(tmp_path / "masks").exit_code == 0


def test_files_that_cannot_be_read_are_told_and_the_others_shown(tmp_path: Path, path: Path):
    (tmp_path / "foreign").write_text("something else")
    (tmp_path / "answer.json").write_text('{"meta_info": {"id": "a"}}')
    (tmp_path / "broken.json").write_text("{")
    wrong = [tmp_path / name for name in ("nowhere", "foreign", "answer.json", "broken.json")]
    result = _run(tmp_path, *wrong, path)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"{path}\n  tokens" in result.stdout
    told = result.stderr.splitlines()
    for line, source, reason in zip(
        told,
        (tmp_path, *wrong),
        ("is a folder", "no such file", "not a whole safetensors file", "return_routed_experts: true", "as JSON"),
        strict=True,
    ):
        assert line.startswith(f"DataError: {source}") and reason in line
