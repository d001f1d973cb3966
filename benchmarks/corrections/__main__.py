"""Bias and noise of the policy gradient under each correction, on policies small enough to know the gradient exactly.

python -m benchmarks.corrections [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    batches: Annotated[
        int, typer.Option(min=2, help="For each scenario, of 256 prompts, 16 responses each; more resolve more.")
    ] = 60,
    seed: Annotated[int, typer.Option(help="Of policies and samples.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure bias and noise of the policy gradient under each correction, where the gradient is known exactly."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.corrections.figures import measure

    measure(batches, seed, json_file)


if __name__ == "__main__":
    typer.run(main)
