"""Shares of responses that trust region masks drop, by the rollout's age in updates and the length of responses.

python -m benchmarks.staleness [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    seed: Annotated[int, typer.Option(help="Of policy and samples.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what trust region masks drop of a rollout that is some updates old, on a small recurrent policy."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.staleness.figures import measure

    measure(seed, json_file)


if __name__ == "__main__":
    typer.run(main)
