"""The package without Megatron-Core, and with one that is broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

_WITHOUT = """
import sys
sys.modules["megatron"] = None
from router_replay.errors import SeamError
try:
    import {module}
except SeamError as error:
    print(error)
"""


@pytest.mark.parametrize("module", ["megatron_router_replay", "megatron_router_replay.averages"])
def test_importing_it_without_megatron_names_the_extra(module: str):
    command = [sys.executable, "-c", _WITHOUT.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "needs Megatron-Core, and importing it failed (No module named 'megatron.core'" in done.stdout
    assert 'pip install "rollout-routing-replay[megatron]"' in done.stdout


_BROKEN = """
from router_replay.errors import SeamError
try:
    import megatron_router_replay
except SeamError as error:
    print(error)
    print(type(error.__cause__).__name__, error.__cause__.name)
"""


def test_a_broken_megatron_keeps_its_cause(tmp_path: Path):
    broken = tmp_path / "megatron" / "core"
    broken.mkdir(parents=True)
    for folder in (broken.parent, broken):
        (folder / "__init__.py").write_text("")
    (broken / "transformer.py").write_text("import a_library_that_it_needs\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{_BROKEN}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, cause = done.stdout.splitlines()
    assert "importing it failed (No module named 'a_library_that_it_needs')" in message
    assert cause == "ModuleNotFoundError a_library_that_it_needs"


_OF_ANOTHER_RELEASE = """
from megatron.core.transformer.moe import moe_utils
del moe_utils.group_limited_topk
from router_replay.errors import SeamError
try:
    import megatron_router_replay
except SeamError as error:
    print(error)
"""


def test_a_release_that_lacks_a_name_is_told_by_the_ledger():
    command = [sys.executable, "-W", "ignore", "-c", _OF_ANOTHER_RELEASE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "megatron.core.transformer.moe.moe_utils.group_limited_topk: expected" in done.stdout
    assert "found nothing of that name" in done.stdout
    assert f"Megatron-Core {importlib.metadata.version('megatron-core')} (megatron-core)" in done.stdout
    assert "pip install" not in done.stdout
