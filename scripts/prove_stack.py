"""Prove what this package says of a stack on the stack's own code, from a checkout of its repository.

    python scripts/prove_stack.py --stack slime --checkout DIR

Holds the ledgers of the stack's adapters against the checkout's sources, then runs the tests of the stack with its own
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
from router_replay_adapters.stacks import STACKS, ledgers_of

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests" / "router_replay_adapters"
OF_ADAPTERS = ("test_unknown_rows.py", "test_starts.py", "test_{}_packed.py")
NAMES = ("miles", "nemo-rl", "slime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=NAMES, required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that holds the stack's package")
    arguments = parser.parse_args()
    folder, stack = arguments.checkout.resolve(), STACKS[arguments.stack]
    if not (folder / stack.package / "__init__.py").is_file():
        parser.error(f"{folder} holds no package {stack.package}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{stack.title} at {_commit(folder)}")
    ledgers = ledgers_of(stack.package)
    if not ledgers:
        tests = [str(TESTS / f"test_{stack.package}.py")]
    elif _fit(ledgers, folder, console):
        tests = ["-k", stack.name, *(str(TESTS / name.format(stack.name)) for name in OF_ADAPTERS)]
    else:
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, f"R3_CHECKOUT_OF_{stack.package.upper()}": str(folder)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


def _fit(ledgers: tuple[Ledger, ...], folder: Path, console: Console) -> bool:
    problems = [problem for each in ledgers for problem in check(each, Source(folder, each.distribution))]
    console.print(f"{len(problems)} of {sum(len(each.seams) for each in ledgers)} names do not fit")
    for problem in problems:
        console.print(f"  {problem}", markup=False)
    return not problems


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "an unknown commit"


if __name__ == "__main__":
    sys.exit(main())
