"""Hold the ledgers against the releases of engines and stacks that the package names, read from their wheels.

    python scripts/contract.py [--folder build/contract]

Wheels are unpacked without their dependencies and nothing of them is imported. Ends with 1 if a release that the
package calls tested or checked does not fit, or one that it refuses does.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_router_replay.ledger import LEDGER as HF_LEDGER
from megatron_router_replay.ledger import AVERAGES_LEDGER
from megatron_router_replay.ledger import LEDGER as REPLAY_LEDGER
from megatron_router_replay.refusals import SETTINGS as REPLAY_SETTINGS
from router_replay.upstream import Ledger, Refusal, Source, check, check_settings
from router_replay_adapters.miles import LEDGER as MILES_LEDGER
from router_replay_adapters.refusals import MEGATRON as QUEUES_MEGATRON
from router_replay_adapters.refusals import SETTINGS as QUEUES_SETTINGS
from router_replay_adapters.verl.ledger import LEDGER as VERL_LEDGER
from router_replay_adapters.verl.refusals import SETTINGS as VERL_SETTINGS
from sglang_router_capture.ledger import LEDGER as CAPTURE_LEDGER
from sglang_router_capture.refusals import SETTINGS

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Contract:
    """What one distribution is held against.

    Attributes:
        ledgers: of this distribution, all with the same releases.
        settings: rows of its settings that are refused.
        refused: releases below the range of our extra, which must not fit.
    """

    ledgers: tuple[Ledger, ...]
    settings: tuple[Refusal, ...]
    refused: tuple[str, ...] = ()


CONTRACTS = (
    Contract((CAPTURE_LEDGER,), SETTINGS),
    Contract((REPLAY_LEDGER, AVERAGES_LEDGER), REPLAY_SETTINGS, refused=("0.16.1",)),
    Contract((HF_LEDGER,), (), refused=("5.10.4",)),
    Contract((MILES_LEDGER,), ()),
    Contract((QUEUES_MEGATRON,), QUEUES_SETTINGS),
    Contract((VERL_LEDGER,), VERL_SETTINGS),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "contract", help="where wheels are kept")
    folder: Path = parser.parse_args().folder
    table = Table("distribution", "release", "the package says", "ledger", "what does not fit")
    as_said = True
    for contract in CONTRACTS:
        ledger = contract.ledgers[0]
        said = {
            **dict.fromkeys(contract.refused, "refused"),
            **dict.fromkeys(ledger.checked, "checked"),
            **dict.fromkeys(ledger.tested, "tested"),
        }
        for release, status in said.items():
            reader = Source(unpacked(ledger.distribution, release, folder), ledger.distribution)
            if reader.release != release:
                raise SystemExit(
                    f"{reader.root} holds {ledger.distribution} {reader.release}, not {release}: delete it"
                )
            problems = [str(problem) for one in contract.ledgers for problem in check(one, reader)]
            problems += check_settings(ledger, contract.settings, reader)
            fits = not problems
            as_said &= fits == (status != "refused")
            table.add_row(ledger.title, release, status, "fits" if fits else "does not fit", "\n".join(problems))
    Console(width=max(160, shutil.get_terminal_size().columns)).print(table)
    return 0 if as_said else 1


def unpacked(distribution: str, release: str, folder: Path) -> Path:
    """Folder with a release's wheel, unpacked; downloads it where it is not there yet."""
    target = folder / f"{distribution}-{release}"
    if not target.exists():
        uv = shutil.which("uv") or str(REPOSITORY / ".tools" / "uv" / "bin" / "uv")
        # A download that is cut short must not pass for a release.
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = (uv, "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--python", sys.executable)
        subprocess.run((*command, "--target", str(partial), f"{distribution}=={release}"), check=True)
        partial.rename(target)
    return target


if __name__ == "__main__":
    sys.exit(main())
