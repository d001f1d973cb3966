"""How long `r3 report` takes for a long run of large steps, on one thread, and what its tallies cost the trainer.

    python -m benchmarks.report [--steps 300] [--tokens 2000000] [--json FILE]

The run is made up: some steps are computed with all their tokens, and the others are these under other numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 300,
    tokens: Annotated[
        int, typer.Option(min=1000, help="Response tokens of a step, in sequences of 1,000.")
    ] = 2_000_000,
    different: Annotated[int, typer.Option(min=1, help="Steps that are computed; the others repeat them.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Reports that are made; medians are told.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure how long the report takes for a long run of large steps, and what its tallies cost the trainer."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.report.figures import measure

    measure(steps, tokens, different, rounds, json_file)


if __name__ == "__main__":
    typer.run(main)
