"""The probe plugin from the tests' side: servers that carry it, and what it saw in their processes."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

from sglang_router_capture.ledger import LEDGER

_PLUGIN = str(Path(__file__).parent / "probe_plugin")
_RELEASE = version(LEDGER.distribution)
HOOKED = [LEDGER.prefix + path for seam in LEDGER.seams if seam.verb == "hooked" for path in seam.paths(_RELEASE)[:1]]
"""Full dotted paths of what is hooked in the installed release."""


def probing(folder: Path) -> dict[str, str]:
    """Environment of a server, each of whose processes reports into `folder`."""
    return {
        "ROUTER_CAPTURE_PROBE": str(folder),
        "ROUTER_CAPTURE_PROBE_PATHS": json.dumps(HOOKED),
        "PYTHONPATH": _PLUGIN,
    }


def renaming(target: str) -> dict[str, str]:
    """Environment of a server in which one upstream name has another name."""
    return {"ROUTER_CAPTURE_PROBE_RENAME": target, "PYTHONPATH": _PLUGIN}


def reports(folder: Path, wait_s: float = 60) -> list[dict]:
    """One report per process: the main process, the scheduler and the detokenizer at least."""
    deadline = time.monotonic() + wait_s
    while len(files := sorted(folder.glob("*.json"))) < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(files)} of 3 processes have reported after {wait_s:.0f} s")
        time.sleep(1)
    return [json.loads(file.read_text()) for file in files]
