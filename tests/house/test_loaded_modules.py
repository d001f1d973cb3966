"""What a process has loaded after an import: the arrows, seen from the running program.

What server processes load is seen from inside them, in tests/sglang_router_capture/test_off.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.house.repository import ROOT

ENGINES = {"sglang", "megatron", "transformers", "ray"}
DRAWING = {"matplotlib"}
TERMINAL = {"typer", "rich"}
PARTS = {"masks", "upstream", "replay", "mismatch", "run", "report"}
ENDS = {"sglang_router_capture", "megatron_router_replay", "hf_router_replay", "router_replay_cli"}

_WALK = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def _loaded(*command: str) -> set[str]:
    """Names of modules after a program that prints them, shortened to packages, and to parts of router_replay."""
    run = subprocess.run([sys.executable, "-c", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names = {tuple(name.split(".")) for name in json.loads(run.stdout)}
    return {name[0] for name in names} | {name[1] for name in names if name[0] == "router_replay" and len(name) > 1}


def test_the_package_itself_loads_nothing_heavy() -> None:
    loaded = _loaded("import json, sys, router_replay; print(json.dumps(sorted(sys.modules)))")
    assert "router_replay" in loaded
    assert not loaded & (ENGINES | DRAWING | TERMINAL | PARTS | ENDS | {"torch", "numpy", "safetensors"})


def test_mismatch_loads_no_engine() -> None:
    loaded = _loaded("import json, sys, router_replay.mismatch; print(json.dumps(sorted(sys.modules)))")
    assert "mismatch" in loaded
    assert not loaded & (ENGINES | DRAWING | TERMINAL | ENDS)


@pytest.mark.parametrize(
    ("part", "below"),
    [
        ("masks", set()),
        ("upstream", set()),
        ("replay", {"masks", "upstream"}),
        ("mismatch", {"masks"}),
        ("run", {"masks", "mismatch"}),
    ],
)
def test_every_module_of_a_part_loads_only_what_is_below(part: str, below: set[str]) -> None:
    loaded = _loaded(_WALK, f"router_replay.{part}")
    assert part in loaded
    assert loaded & PARTS <= below | {part}
    assert not loaded & (ENGINES | DRAWING | TERMINAL | ENDS)


def test_the_report_draws_and_knows_no_engine() -> None:
    loaded = _loaded(_WALK, "router_replay.report")
    assert {"report", "matplotlib"} <= loaded
    assert not loaded & (ENGINES | TERMINAL | ENDS)
