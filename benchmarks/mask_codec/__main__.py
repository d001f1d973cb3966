"""How many bytes a token's routes take in each codec, and what packing and carrying them costs.

    python -m benchmarks.mask_codec [--before COMMIT] [--json FILE]

Sizes and speeds are for the geometries of released models; the whole way from the server to the trainer is for one of
them, beside what a server without this project does with the same routes: gather int32, base64, JSON, and back.

`--before` puts packing and unpacking beside those of another commit, for three models, in turns. On a CPU there is one
path to measure: the codec has no hand-written intrinsics and chooses nothing by the CPU's features, so that what the
compiler makes of it is what runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.mask_codec.models import MODELS


def main(
    model: Annotated[str, typer.Option(help=f"Geometry whose way is timed: {', '.join(MODELS)}.")] = "Qwen3-30B-A3B",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on that way.")] = 32768,
    speed_tokens: Annotated[int, typer.Option(min=1, help="Tokens for the speeds of all models.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 5,
    threads: Annotated[
        int, typer.Option(min=1, help="Of torch. With one, CPU time is work alone; more wait for each other in it.")
    ] = 1,
    before: Annotated[
        str | None,
        typer.Option(
            metavar="COMMIT|FOLDER",
            help="Codec to compare with: a commit, built under build/, or a folder with the package and its kernels.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure how many bytes a token's routes take in each codec, and what packing and carrying them costs."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.mask_codec.figures import measure

    measure(model, tokens, speed_tokens, rounds, threads, before, json_file)


if __name__ == "__main__":
    typer.run(main)
