"""`python -m examples.multi_turn_replay`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cpu_engines.sglang.server import Server
from examples.multi_turn_replay.__main__ import main
from examples.multi_turn_replay.replay_report import OWN_ROUTES, REPLAYED
from router_replay.report.summary import summarize
from router_replay.run import read_run

pytestmark = pytest.mark.timeout(900)


def _run(command, *arguments: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments))


def test_main_job_against_a_running_server(capture_server: Server, small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = _run(
        main,
        *("--server", capture_server.url, "--model", str(small_model), "--conversations", "128", "--group-size", "2"),
        *("--concurrency", "8", "--seed", "5", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((out / "demo.json").read_text())
    assert report["conversations"] == 128
    assert report["seed"] == 5
    assert report["turns"] >= 2 * 128
    assert report["prefix_cached_tokens"] > 0
    assert report["valid_rows"] + report["invalid_rows"] == report["tokens"]
    # Only the last sampled token of a conversation was never fed back.
    assert report["invalid_rows"] == 128
    assert report["kl_k3"]["replay"] < report["kl_k3"]["native"]
    assert report["route_mismatch"]["tokens"] >= report["route_mismatch"]["rows"] > 0
    assert {"1.1", "2"} <= report["f_tau"].keys()
    assert report["bytes_per_token"]["masks"] < report["bytes_per_token"]["sglang_base64"]
    assert report["versions"]["sglang"] and report["versions"]["megatron-core"]
    assert (out / "mismatch.png").stat().st_size > 10_000
    # The page is of the same tokens, through the files that a trainer would write.
    files = sorted((out / "mismatch").iterdir())
    assert len(files) == 8
    # 64 problems with two conversations each: whole groups in every step.
    assert [int(step.responses.groups.counts.max()) for step in read_run(files)] == [2] * 8
    run = summarize(read_run(files))
    assert run.passes[OWN_ROUTES].diagnostics.num_tokens == report["sampled_tokens"]
    assert run.passes[OWN_ROUTES].diagnostics.k3 == pytest.approx(report["kl_k3"]["native"], rel=1e-6)
    assert run.passes[REPLAYED].diagnostics.k3 == pytest.approx(report["kl_k3"]["replay"], rel=1e-6)
    assert run.routes is not None and run.routes.differing_routes == pytest.approx(report["route_mismatch"]["rows"])
    page = (out / "report.html").read_text()
    assert page.count("<figure ") == page.count("<img ") == 7
    for name in ("demo.json", "mismatch.png", "mismatch", "report.html"):
        assert f"written: {out / name} (" in result.output
    assert f"{report['tokens']:,}" in result.output


def test_main_job_with_a_model_of_hugging_face(capture_server: Server, small_model: Path, tmp_path: Path) -> None:
    """The job itself ends with an error where a replayed expert is not the recorded one."""
    out = tmp_path / "report"
    result = _run(
        main,
        *("--server", capture_server.url, "--model", str(small_model), "--conversations", "48", "--group-size", "2"),
        *("--concurrency", "8", "--seed", "6", "--trainer", "hf", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((out / "demo.json").read_text())
    assert report["trainer"] == "hf"
    assert report["invalid_rows"] == report["conversations"] == 48
    assert report["route_mismatch"]["rows"] > 0
    assert 0 < report["kl_k3"]["replay"] < report["kl_k3"]["native"]


def test_main_job_without_a_server_says_so(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = _run(main, "--server", "http://127.0.0.1:9", "--model", str(small_model), "--out", str(out))
    assert result.exit_code == 1
    assert "http://127.0.0.1:9" in result.output.replace("\n", "")
    assert not out.exists()
