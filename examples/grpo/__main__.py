"""Train the small model on the calculator task by GRPO: SGLang plays, Megatron-Core learns, R3 keeps them together.

    python -m examples.grpo --steps 10 --out runs/first
    r3 report runs/first/mismatch

A run is a folder. Started again with the same folder it goes on after its last whole step, also after a kill in the
middle of one, whose conversations are not played again; the trainer's part is the same to the last bit.

Without `--server` an SGLang is started here, on the GPU where there is one, else on the CPU; the trainer always runs on
the CPU here: see the README beside this program for a larger model on GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from examples.grpo.settings import Settings, SettingsError
from examples.small_model import CHECKPOINT

_DEFAULT = Settings()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run: a new one, or one to go on with.")] = Path("runs/grpo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole run, those done before included.")] = 100,
    routes: Annotated[
        Literal["own", "R3", "R2"],
        typer.Option(help="Whose routes the trainer takes: its own, the rollout's, or its old policy's."),
    ] = _DEFAULT.routes,
    algorithm: Annotated[Literal["GRPO", "GSPO"], typer.Option(help="Whose loss.")] = _DEFAULT.algorithm,
    correction: Annotated[
        Literal["none", "TIS", "MIS"], typer.Option(help="Importance sampling of tokens, truncated or masked.")
    ] = _DEFAULT.correction,
    score_centering: Annotated[
        int, typer.Option(min=0, help="Most probable tokens of the sampler by which scores are centred; 0: not.")
    ] = _DEFAULT.score_centering,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Conversations not to learn from: one-reward, cut-off, bad-call; once for each."),
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems of a step.")] = _DEFAULT.problems,
    group_size: Annotated[int, typer.Option(min=2, help="Conversations about each problem.")] = _DEFAULT.group_size,
    operations: Annotated[
        tuple[int, int], typer.Option(metavar="MIN MAX", help="Operations of a problem.")
    ] = _DEFAULT.operations,
    minibatches: Annotated[int, typer.Option(min=1, help="Optimizer steps of a step.")] = _DEFAULT.minibatches,
    microbatch: Annotated[int, typer.Option(min=1, help="Conversations in a forward pass.")] = _DEFAULT.microbatch,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = _DEFAULT.learning_rate,
    warmup: Annotated[int, typer.Option(min=1, help="Optimizer steps in which the rate rises.")] = _DEFAULT.warmup,
    clip_gradient: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = _DEFAULT.clip_gradient,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = _DEFAULT.evaluate_every,
    evaluation_problems: Annotated[
        int, typer.Option(min=1, help="Held-out problems of an evaluation.")
    ] = _DEFAULT.evaluation_problems,
    seed: Annotated[int, typer.Option(help="Chooses the problems.")] = _DEFAULT.seed,
    model: Annotated[Path, typer.Option(help="Qwen3-MoE checkpoint to start from, and of --server.")] = CHECKPOINT,
    server: Annotated[str | None, typer.Option(help="URL of a running SGLang with --enable-router-capture.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations that are played at a time.")] = 64,
) -> None:
    """Train the small model on the calculator task by GRPO, with SGLang, Megatron-Core and routing replay."""
    try:
        settings = Settings(
            algorithm=algorithm,
            routes=routes,
            correction=correction,
            score_centering=score_centering,
            drop=tuple(drop or ()),
            problems=problems,
            group_size=group_size,
            operations=operations,
            minibatches=minibatches,
            microbatch=microbatch,
            learning_rate=learning_rate,
            warmup=warmup,
            clip_gradient=clip_gradient,
            evaluate_every=evaluate_every,
            evaluation_problems=evaluation_problems,
            seed=seed,
        )
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error
    # Here and not above: `--help` need not wait for torch and transformers.
    from examples.grpo.job import run

    run(settings, steps=steps, out=out, model=model, server=server, concurrency=concurrency)


if __name__ == "__main__":
    typer.run(main)
