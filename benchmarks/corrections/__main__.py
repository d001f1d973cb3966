"""What each correction of the policy gradient is worth, on policies small enough to know everything exactly.

    python -m benchmarks.corrections [--cost] [--json FILE]

A sampler's weights are not quite the trainer's: each is off by a relative error, the same in every step or another in
each, or they are some steps old. Of each correction this measures, over several seeds, the bias and the noise of the
policy gradient beside the exact one, a sum over all responses there are; and the exact expected reward that training
reaches, beside a control whose sampler is the trainer itself.

What is not: a mixture of experts, and so no routes to replay; long responses; a model that was trained before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, of policies, rewards, errors and samples.")] = 9,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    batches: Annotated[
        int, typer.Option(min=2, help="Sampled for the noise of each seed's gradient; more resolve more.")
    ] = 120,
    rollouts: Annotated[int, typer.Option(min=4, help="Of each training, a multiple of 4.")] = 128,
    cost: Annotated[
        bool, typer.Option("--cost", help="Time and memory instead: 129k packed tokens, 64k of them one response.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what each correction makes of gradient and training, where both are known exactly."""
    if rollouts % 4:
        raise typer.BadParameter(f"{rollouts} rollouts cannot be looked at in quarters: give a multiple of 4")
    # Here and not above: `--help` need not wait for torch.
    if cost:
        from benchmarks.corrections.cost import measure_cost

        measure_cost(seed, json_file)
        return
    from benchmarks.corrections.figures import measure

    measure(seeds, seed, batches, rollouts, json_file)


if __name__ == "__main__":
    typer.run(main)
