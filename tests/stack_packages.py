"""Where the packages of stacks are imported from, in tests alone."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKOUT = "R3_CHECKOUT_OF_{}"
"""Variable with the folder of a stack's repository, by which scripts/prove_stack.py has its own code tested."""


def checkout(stack: str) -> Path | None:
    """The repository of a stack that this run was given; None where it was given none."""
    folder = os.environ.get(CHECKOUT.format(stack.upper()))
    return None if folder is None else Path(folder)


def miles() -> Path:
    """Folder that holds the package of miles: a given checkout, or what the wheel of miles-rl has of it."""
    given = checkout("miles")
    if given is not None:
        return given
    run = subprocess.run(["bash", str(ROOT / "scripts" / "miles.sh")], stdout=subprocess.PIPE, text=True, check=True)
    return Path(run.stdout.strip())


@contextlib.contextmanager
def importable(package: str, folder: Path) -> Iterator[None]:
    """Let a package be imported from a folder, and from nowhere afterwards."""
    assert package not in sys.modules
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
            del sys.modules[name]
