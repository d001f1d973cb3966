"""`scripts/gpu_check.sh` names every test that needs a GPU, says what is missing, and takes no failure for success."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import ROOT, files_of, tree_of

SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def needs_a_gpu(path: Path) -> bool:
    """Whether a file has `pytest.mark.gpu`."""
    attributes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute) and node.attr == "gpu")
    return any(isinstance(node.value, ast.Attribute) and node.value.attr == "mark" for node in attributes)


def test_every_test_that_needs_a_gpu_is_named_and_no_other() -> None:
    there = {str(path.relative_to(ROOT)) for path in files_of("tests") if needs_a_gpu(path)}
    assert len(there) > 4
    assert set(re.findall(r"tests/\S+\.py", SCRIPT.read_text())) == there


def check(script: Path, python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script with an interpreter that is this shell script."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/sh\n{python}\n")
    interpreter.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(interpreter)}
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)


def test_packages_that_are_missing_are_named(tmp_path: Path) -> None:
    done = check(SCRIPT, f'exec {sys.executable} -S "$@"', tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "-m pip install torch setuptools numpy" in done.stderr and "pytest-timeout" in done.stderr


@pytest.mark.parametrize(("status", "failed"), [(0, False), (5, True), (1, True)])
def test_a_part_without_tests_has_failed(tmp_path: Path, status: int, failed: bool) -> None:
    """Pytest's exit status is 5 where it found no test."""
    script = tmp_path / "scripts" / SCRIPT.name
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    python = f"""case "$*" in
      *find_spec*) ;;
      *device_name*) echo "Device 9" ;;
      *pytest*) exit {status} ;;
    esac"""
    done = check(script, python, tmp_path)
    assert done.returncode == int(failed), done.stdout + done.stderr
    (report,) = (tmp_path / "benchmarks" / "results").glob("gpu-Device-9-*.md")
    assert (f"exit status {status}" in report.read_text()) is failed
