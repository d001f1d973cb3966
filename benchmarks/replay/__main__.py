"""What replay costs the trainer: its routers, a MoE layer, a training step, and binding a microbatch on the host.

    python -m benchmarks.replay [--json FILE]

Megatron-Core's own layers on the CPU, each with its own top-k, with its own RouterReplay, and with this package's
replay; and the step of a model of Hugging Face, natively and with replay. Native runs twice under two names: what these
differ by is the noise of the run. A CPU's top-k is far dearer than a GPU's beside everything else, so a GPU gains less:
look at the number of operators, which is the same on both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.replay.shapes import SHAPES


def main(
    shapes: Annotated[
        list[str], typer.Option("--shape", help=f"Router shapes: {', '.join(SHAPES)}; several with several --shape.")
    ] = list(SHAPES),  # noqa: B006 (typer reads it)
    tokens: Annotated[int, typer.Option(min=64, help="Places of the routers.")] = 2048,
    layer_tokens: Annotated[int, typer.Option(min=64, help="Places of a layer and of a step.")] = 512,
    hidden: Annotated[
        int, typer.Option(min=16, help="Hidden size; far below the models' own, which a CPU would spend its time on.")
    ] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of routers and binds; half as many of layers and steps.")
    ] = 21,
    bind_tokens: Annotated[int, typer.Option(min=64, help="Of the microbatch that is bound.")] = 8192,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what replay costs the trainer, beside native routing and Megatron's own RouterReplay, on the CPU."""
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SHAPES)}")
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.replay.figures import measure

    measure(shapes, tokens, layer_tokens, hidden, rounds, bind_tokens, threads, json_file)


if __name__ == "__main__":
    typer.run(main)
