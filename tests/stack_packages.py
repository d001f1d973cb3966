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


def checkout(package: str) -> Path | None:
    """The repository of a stack's package that this run was given; None where it was given none."""
    folder = os.environ.get(CHECKOUT.format(package.upper()))
    return None if folder is None else Path(folder)


def miles() -> Path:
    """Folder that holds the package of miles: a given checkout, or what the wheel of miles-rl has of it."""
    return checkout("miles") or _of_wheel("miles")


def areal() -> Path:
    """Folder that holds the package of AReaL, from its wheel, and what it imports and the environment does not have."""
    return _of_wheel("areal")


def _of_wheel(stack: str) -> Path:
    command = ["bash", str(ROOT / "scripts" / "stack_package.sh"), stack]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(run.stdout.strip())


def beside(folder: Path) -> dict[str, str]:
    """Variables of a process that imports from a folder, too, and has one thread."""
    paths = [os.environ.get("PYTHONPATH"), str(folder)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


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
