"""Train the small Qwen3-MoE checkpoint of the examples from scratch, on the calculator task, on a CPU.

    python -m examples.small_model.train --out examples/small_model/checkpoint --steps 1500 --seed 0

Training stops early once sampled episodes are solved often enough (`--stop-accuracy`): the checkpoint is a starting
point for reinforcement learning, which needs problems that are solved sometimes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint; replaced if it exists.")],
    steps: Annotated[int, typer.Option(help="Most optimizer steps; also the length of the rate's cosine.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Conversations per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its largest value, after the warm-up.")] = 2e-3,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 50,
    stop_accuracy: Annotated[float, typer.Option(help="Stop at this held-out accuracy; above 1 never.")] = 0.5,
    final_problems: Annotated[int, typer.Option(help="Held-out problems of the final evaluation.")] = 512,
    dense_layers: Annotated[int, typer.Option(help="Leading decoder layers without experts.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, problems and sampling.")] = 0,
) -> None:
    """Train the small Qwen3-MoE from scratch on the calculator task, evaluate it, and write its checkpoint and card."""
    if out.exists() and not (out / "config.json").is_file():
        raise typer.BadParameter(f"{out} exists and is no checkpoint, and would be replaced", param_hint="--out")
    # Here and not above: `--help` need not wait for torch and transformers.
    from examples.small_model.training import train_checkpoint

    train_checkpoint(
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_every=evaluate_every,
        stop_accuracy=stop_accuracy,
        final_problems=final_problems,
        dense_layers=dense_layers,
        threads=threads,
        seed=seed,
    )


if __name__ == "__main__":
    typer.run(main)
