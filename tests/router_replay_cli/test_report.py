"""`r3 report` as a user runs it."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from router_replay_cli.report import report
from tests.router_replay.report.runs import write_run


def _run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_names_files_and_options():
    result = _run("--help")
    assert result.exit_code == 0
    for text in (
        ".jsonl",
        ".safetensors",
        "--out",
        "--pass",
        "--tau",
        "--title",
        "--name",
        "--step-means",
        "write_step",
    ):
        assert text in result.output


def test_a_page_is_written_from_files_of_both_kinds(tmp_path: Path):
    folder = write_run(tmp_path / "run", 2)
    line = {"step": 7, "rollout_logprobs": [-1.0, -2.0], "trainer_logprobs": {"own routes": [-1.5, -2.0]},
            "response_mask": [1, 1]}  # fmt: skip
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps(line) + "\n")
    out = tmp_path / "made" / "page.html"
    arguments = ("--title", "A <b>run</b>", "--tau", 1.25, "--tau", 3, "--step-means", "an epoch & no more")
    result = _run(folder, lines, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    assert "own routes: KL (k3) " in result.output and f"written: {out}" in result.output
    assert list(out.parent.iterdir()) == [out]
    page = out.read_text()
    assert "<h1>A &lt;b&gt;run&lt;/b&gt;</h1>" in page and "<b>" not in page
    assert "A step is an epoch &amp; no more." in page
    assert "3 steps, 0 to 7; 338 response tokens" in page
    assert "F(1.25)" in page and "F(3)" in page and "F(1.1)" not in page
    assert "From run (2 files), more.jsonl. Made with rollout-routing-replay" in page
    assert str(tmp_path) not in page
    again = _run(folder, lines, "--out", out, *arguments)
    assert again.exit_code == 0 and out.read_text() == page


def test_folders_are_runs_side_by_side(tmp_path: Path):
    folders = [write_run(tmp_path / name / "mismatch", 2) for name in ("own", "R3")]
    out = tmp_path / "page.html"
    result = _run(*folders, "--out", out)
    assert result.exit_code == 0, result.output
    assert "own/mismatch, own routes: KL (k3) " in result.output and "R3/mismatch, replayed: KL" in result.output
    page = out.read_text()
    assert '<th scope="col">own/mismatch: own routes</th>' in page and page.count('id="dynamics"') == 1
    assert "From mismatch (2 files), mismatch (2 files). Made with" in page and str(tmp_path) not in page
    named = _run(*folders, "--name", "arm <1>", "--name", "arm <1>", "--out", out)
    assert named.exit_code == 0 and "arm &lt;1&gt; (2 runs)" not in out.read_text()
    assert '<th scope="row">arm &lt;1&gt;</th>' in out.read_text()
    # A file may be a run, if it has a name of its own.
    assert _run(folders[0], next(folders[1].iterdir()), "--name", "a", "--name", "b", "--out", out).exit_code == 0
    wrong = _run(*folders, "--name", "a", "--out", out)
    assert wrong.exit_code == 2 and "got 1 names for 2 paths: give one for each" in wrong.output
    (folders[1] / "step-00000000.safetensors").write_bytes(b"1234")
    broken = _run(*folders, "--out", tmp_path / "other.html")
    assert broken.exit_code == 1 and "DataError: R3/mismatch: " in broken.output


def test_only_the_passes_that_are_asked_for(tmp_path: Path):
    folder = write_run(tmp_path / "run", 1)
    assert _run(folder, "--out", tmp_path / "page.html", "--pass", "replayed").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert '<th scope="col">replayed</th>' in page and "own routes</th>" not in page
    refused = _run(folder, "--out", tmp_path / "other.html", "--pass", "reference")
    assert refused.exit_code == 1
    assert "no step has the trainer passes ['reference']; the run has ['own routes', 'replayed']" in refused.output


def test_a_step_that_cannot_be_compared_is_left_out_and_told(tmp_path: Path):
    lines = [
        {"step": step, "rollout_logprobs": [-1.0, -2.0], "trainer_logprobs": {"old": old}, "response_mask": [1, 1]}
        for step, old in ((0, [-1.5, -2.0]), (1, [None, -2.0]))
    ]
    run, out = tmp_path / "run.jsonl", tmp_path / "page.html"
    run.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = _run(run, "--out", out)
    assert result.exit_code == 0, result.output
    reason = "Step 1 is left out: trainer pass 'old': 1 of 2 response tokens have no log-ratio"
    assert f"warning: {reason}" in result.output and reason in html.unescape(out.read_text())
    run.write_text(json.dumps(lines[1]))
    out.unlink()
    refused = _run(run, "--out", out)
    assert refused.exit_code == 1 and "DataError: no step is left: 1 cannot be compared" in refused.output
    assert not out.exists()


def test_steps_of_two_files_are_told(tmp_path: Path):
    line = {"rollout_logprobs": [-1.0, -2.0], "trainer_logprobs": [-1.5, -2.0], "response_mask": [1, 1]}
    text = "".join(f"{json.dumps({**line, 'step': step})}\n" for step in range(12))
    files = [tmp_path / rank / "run.jsonl" for rank in ("first", "second")]
    for path in files:
        path.parent.mkdir()
        path.write_text(text)
    result = _run(*files, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    told = "Steps 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more come from first/run.jsonl and second/run.jsonl, and"
    assert f"warning: {told}" in result.output and told in (tmp_path / "page.html").read_text()
    alone = _run(files[0], "--out", tmp_path / "page.html")
    assert alone.exit_code == 0 and "come from" not in alone.output


def test_errors_are_told_without_a_traceback(tmp_path: Path):
    out = tmp_path / "page.html"
    lines = tmp_path / "run.jsonl"
    lines.write_text('{"step": 0, "rollout_logprobs": [-1], "trainer_logprobs": [[1]], "response_mask": [1]}\n')
    good = write_run(tmp_path / "run", 1)
    for arguments, message in (
        ((tmp_path / "nowhere", "--out", out), "DataError: .*nowhere: no such file or folder"),
        ((lines, "--out", out), "DataError: .*run.jsonl, line 1: 'trainer_logprobs' of 'trainer' must be"),
        ((good, good / "step-00000000.safetensors", lines, "--out", out), "DataError: "),
        ((good, "--out", lines / "page.html"), "Error: "),
    ):
        result = _run(*arguments)
        assert result.exit_code == 1, result.output
        assert re.search(message, result.output)
        assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert _run(good, "--tau", 1, "--out", out).exit_code == 2
    assert not out.exists()


@pytest.mark.parametrize("name", ["run.jsonl", "other.jsonl", "page.jsonl.gz", "page.safetensors"])
def test_no_file_of_a_run_is_overwritten(tmp_path: Path, name: str):
    lines = tmp_path / "run.jsonl"
    lines.write_text('{"step": 0, "rollout_logprobs": [-1], "trainer_logprobs": [-1], "response_mask": [1]}\n')
    result = _run(lines, "--out", tmp_path / name)
    assert result.exit_code == 1
    assert (
        f"--out {tmp_path / name}: .jsonl" in result.output or f"--out {tmp_path / name}: .safetensors" in result.output
    )
    assert lines.read_text().startswith('{"step"') and list(tmp_path.iterdir()) == [lines]


def test_the_target_is_checked_before_anything_is_read(tmp_path: Path):
    broken = tmp_path / "run.jsonl"
    broken.write_text("not JSON\n")
    link = tmp_path / "page.html"
    link.symlink_to(broken)
    (tmp_path / "folder.html").mkdir()
    for out, message in (
        (link, "is a file of the run itself"),
        (tmp_path / "folder.html", "is a folder: name the HTML file in it"),
        # No folder can be made below a file, and none in /proc, not by root either.
        (broken / "page.html", "cannot be written, because nothing can be made in"),
        (Path("/proc/missing/page.html"), "cannot be written, because nothing can be made in /proc"),
    ):
        result = _run(broken, "--out", out)
        assert result.exit_code == 1
        assert f"DataError: --out {out}: {message}" in result.output
    assert broken.read_text() == "not JSON\n"


def test_trainers_write_steps_without_the_extra():
    """Neither matplotlib nor Megatron-Core nor a terminal's libraries."""
    program = (
        "import sys\nsys.modules |= dict.fromkeys(('matplotlib', 'typer', 'rich'))\n"
        "from router_replay.run import RunStep, write_step\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('megatron', 'sglang')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
