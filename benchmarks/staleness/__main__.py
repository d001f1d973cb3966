"""Shares of responses that trust region masks drop, by the rollout's age in updates and the length of responses.

python -m benchmarks.staleness [--seeds 5] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Of policy and samples; medians are told, and the range.")] = 5,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what trust region masks drop of a rollout that is some updates old, on a small recurrent policy."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.staleness.figures import measure

    measure(seeds, seed, json_file)


if __name__ == "__main__":
    typer.run(main)
