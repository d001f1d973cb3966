"""verl imports the adapter in every process, and what it loads and says there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.house.repository import ROOT

START = """
import json, logging, sys
import cpu_engines.megatron
import verl
loaded = sorted(sys.modules)
from verl.utils.megatron import router_replay_patch
wrapped = hasattr(router_replay_patch.RouterReplay.set_target_indices, "__wrapped__")
print(json.dumps({"loaded": loaded, "wrapped": wrapped}))
"""

ANOTHER_RELEASE = """
import wrapt
import cpu_engines.megatron

@wrapt.when_imported("verl.utils.megatron.router_replay_patch")
def another_release(module):
    module.RouterReplay.set_target_indices = lambda self, routes: None

import verl
print("verl is there")
import verl.utils.megatron.router_replay_patch
"""
ENGINES = {"sglang", "megatron", "transformers", "ray", "megatron_router_replay"}


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def with_adapter() -> subprocess.CompletedProcess[str]:
    return run(START, VERL_USE_EXTERNAL_MODULES="router_replay_adapters.verl")


def test_nothing_of_verl_is_loaded_earlier(with_adapter: subprocess.CompletedProcess[str]) -> None:
    without = run(START)
    found, stock = (json.loads(each.stdout.splitlines()[-1]) for each in (with_adapter, without))
    assert found["wrapped"] and not stock["wrapped"]
    added = {name.partition(".")[0] for name in set(found["loaded"]) - set(stock["loaded"])}
    assert "router_replay_adapters" in added
    assert {name for name in set(found["loaded"]) - set(stock["loaded"]) if name.startswith("verl.")} == set()
    assert not added & ENGINES
    of_the_server = {name for name in found["loaded"] if name.startswith("sglang_router_capture.")}
    assert of_the_server == {"sglang_router_capture.options"}


def test_it_says_so_in_one_line(with_adapter: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in with_adapter.stderr.splitlines() if "router_replay_adapters" in line]
    assert len(lines) == 1 and "on in process" in lines[0]


def test_a_release_that_does_not_fit_stops_whoever_imports_it() -> None:
    """The import of verl itself goes through: only who needs the name is stopped."""
    done = run(ANOTHER_RELEASE, VERL_USE_EXTERNAL_MODULES="router_replay_adapters.verl")
    assert done.returncode != 0 and "verl is there" in done.stdout
    assert "SeamError: the adapter to verl does not fit the installed verl 0.9.1 (verl)" in done.stderr
    assert (
        "RouterReplay.set_target_indices: expected parameters (topk_indices, replay_mask), found parameters (routes)"
        in done.stderr
    )
    assert "leave router_replay_adapters.verl out of VERL_USE_EXTERNAL_MODULES" in done.stderr
