"""`r3` itself: how it finds its subcommands, what it loads for a help, and what it says where something is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration
from typer.testing import CliRunner, Result

import router_replay
from router_replay_cli import main as cli
from router_replay_cli.doctor import doctor
from router_replay_cli.inspect_files import inspect
from router_replay_cli.main import SUBCOMMANDS, Subcommand
from router_replay_cli.report import report
from tests.router_replay.report.runs import write_run

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALL = 'pip install "rollout-routing-replay[report]"'


def _run(*arguments: str) -> Result:
    # One line for each subcommand, however long its summary.
    return CliRunner().invoke(cli.build_app(arguments), list(arguments), terminal_width=400, max_content_width=400)


def test_every_subcommand_of_the_table_resolves_and_is_in_the_help():
    assert EntryPoint("r3", PYPROJECT["project"]["scripts"]["r3"], "console_scripts").load() is cli.main
    loaded = {name: EntryPoint(name, each.target, "").load() for name, each in SUBCOMMANDS.items()}
    assert loaded == {"doctor": doctor, "inspect": inspect, "report": report}
    help_text = _run("--help")
    assert help_text.exit_code == 0
    for name, each in SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(each.summary)}$", help_text.output, re.MULTILINE)
        own = _run(name, "--help")
        assert own.exit_code == 0 and loaded[name].__doc__.strip().splitlines()[0] in own.output


def test_the_help_names_the_extra_with_its_brackets():
    assert INSTALL in _run("--help").output


def test_a_help_loads_neither_torch_nor_what_draws():
    """It answers at once."""
    program = (
        "import json, sys\nfrom router_replay_cli.main import main\nsys.argv = ['r3', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n    print(json.dumps(sorted(sys.modules)))"
    )
    for arguments in (["--help"], ["--version"], ["inspect", "--help"], ["report", "--help"], ["doctor", "--help"]):
        result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        loaded = set(json.loads(result.stdout.splitlines()[-1]))
        assert "typer" in loaded
        assert not loaded & {"torch", "numpy", "matplotlib", "safetensors", "sglang", "megatron"}


def test_the_version_is_one():
    result = _run("--version")
    assert (result.exit_code, result.output) == (0, f"{router_replay.__version__}\n")
    read = read_configuration(ROOT / "pyproject.toml", ignore_option_errors=True)
    assert read["project"]["version"] == router_replay.__version__


def test_an_unknown_subcommand_is_named():
    result = _run("reprot", "x")
    assert result.exit_code == 2 and "No such command 'reprot'" in result.output


def test_a_subcommand_runs_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sys, "argv", ["r3", "report", str(write_run(tmp_path / "run", 1)), "-o", str(tmp_path / "page")]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0 and (tmp_path / "page").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    "other",
    [
        Subcommand("not_there.at_all:run", "Does what."),
        Subcommand("router_replay_cli.report:report", "Does what.", ("not_there",)),
    ],
    ids=["its module", "what it needs"],
)
def test_a_subcommand_that_lacks_a_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, other: Subcommand):
    monkeypatch.setitem(SUBCOMMANDS, "other", other)
    result = _run("other", "--unknown", "argument")
    assert result.exit_code == 1
    assert f"needs not_there, which is not installed: {INSTALL}" in result.output
    assert _run("report", "--help").exit_code == 0
    if other.needs:
        assert f"Does what. Needs not_there: {INSTALL}" in _run("--help").output


def test_report_needs_what_draws():
    program = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['r3', 'report', 'run.jsonl']\n"
        "from router_replay_cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"needs matplotlib, which is not installed: {INSTALL}" in result.stderr


def test_without_typer_r3_says_how_to_get_it():
    program = "import sys; sys.modules['typer'] = None; from router_replay_cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'r3 needs typer, which is not installed: pip install "rollout-routing-replay[report]"' in result.stderr
