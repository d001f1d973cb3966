"""The package without transformers."""

from __future__ import annotations

import subprocess
import sys

_WITHOUT = """
import sys
sys.modules["transformers"] = None
from router_replay.errors import SeamError
try:
    import hf_router_replay
except SeamError as error:
    print(error)
"""


def test_importing_it_without_transformers_names_the_extra():
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=True)
    assert "needs transformers, and importing it failed" in done.stdout
    assert 'pip install "rollout-routing-replay[hf]"' in done.stdout
