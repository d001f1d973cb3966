"""The package without Megatron-Core."""

from __future__ import annotations

import subprocess
import sys

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
