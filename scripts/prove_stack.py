"""Prove a stack's adapter on the stack's own code, from a checkout of its repository.

    python scripts/prove_stack.py --stack slime --checkout DIR

Holds the adapter's ledgers against the checkout's sources, then runs the tests of the adapter with the stack's own
modules in the place of what the repository's tests use. They run on stock Megatron-Core and a CPU: the stack's package
has to be importable beside what this repository installs, as far as its replay needs it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from router_replay.upstream import Ledger, Source, check
from router_replay_adapters import miles, miles_packed, slime, slime_packed

REPOSITORY = Path(__file__).resolve().parents[1]
LEDGERS: dict[str, tuple[Ledger, ...]] = {
    "miles": (miles.LEDGER, miles_packed.SAMPLES, miles_packed.GENERATE, miles_packed.TRAINER),
    "slime": (
        slime.LEDGER,
        slime_packed.SAMPLES,
        slime_packed.CONVERSION,
        slime_packed.TRAINER,
        slime_packed.QUEUES,
    ),
}
TESTS = ("test_unknown_rows.py", "test_starts.py", "test_{}_packed.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=sorted(LEDGERS), required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="folder that holds the stack's package")
    arguments = parser.parse_args()
    folder = arguments.checkout.resolve()
    if not (folder / arguments.stack / "__init__.py").is_file():
        parser.error(f"{folder} holds no package {arguments.stack}")
    ledgers = LEDGERS[arguments.stack]
    problems = [problem for each in ledgers for problem in check(each, Source(folder, each.distribution))]
    num_names = sum(len(each.seams) for each in ledgers)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{ledgers[0].title} at {_commit(folder)}: {len(problems)} of {num_names} names do not fit")
    for problem in problems:
        console.print(f"  {problem}", markup=False)
    if problems:
        return 1
    folder_of_tests = REPOSITORY / "tests" / "router_replay_adapters"
    tests = [str(folder_of_tests / name.format(arguments.stack)) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", arguments.stack, *tests]
    environment = {**os.environ, f"R3_CHECKOUT_OF_{arguments.stack.upper()}": str(folder)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "an unknown commit"


if __name__ == "__main__":
    sys.exit(main())
