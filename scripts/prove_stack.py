"""Prove what this package says of a stack on the stack's own code, from a checkout of its repository.

    python scripts/prove_stack.py --stack slime --checkout DIR

Holds the ledger of the stack's adapter against the checkout's sources, then runs the tests of the stack with its own
modules in the place of what the repository's tests use. They run on stock Megatron-Core and a CPU: the stack's package
has to be importable beside what this repository installs, as far as its replay needs it. NeMo-RL has no adapter and no
ledger: its tests show that it takes unknown rows as they are meant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from router_replay.upstream import Ledger, Source, check
from router_replay_adapters import miles, slime
from router_replay_adapters.stacks import STACKS

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests" / "router_replay_adapters"
OF_ADAPTERS = ("test_unknown_rows.py", "test_starts.py")
LEDGERS: dict[str, Ledger | None] = {"miles": miles.LEDGER, "slime": slime.LEDGER, "nemo-rl": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=sorted(LEDGERS), required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that holds the stack's package")
    arguments = parser.parse_args()
    folder, stack = arguments.checkout.resolve(), STACKS[arguments.stack]
    if not (folder / stack.package / "__init__.py").is_file():
        parser.error(f"{folder} holds no package {stack.package}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{stack.title} at {_commit(folder)}")
    ledger = LEDGERS[stack.name]
    if ledger is None:
        tests = [str(TESTS / f"test_{stack.package}.py")]
    elif _fits(ledger, folder, console):
        tests = ["-k", stack.name, *(str(TESTS / name) for name in OF_ADAPTERS)]
    else:
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, f"R3_CHECKOUT_OF_{stack.package.upper()}": str(folder)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


def _fits(ledger: Ledger, folder: Path, console: Console) -> bool:
    problems = check(ledger, Source(folder, ledger.distribution))
    console.print(f"{len(problems)} of {len(ledger.seams)} names do not fit")
    for problem in problems:
        console.print(f"  {problem}", markup=False)
    return not problems


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "an unknown commit"


if __name__ == "__main__":
    sys.exit(main())
