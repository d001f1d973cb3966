"""What it costs to bring routes from the slot table to what the trainer's router takes.

    python -m benchmarks.transport [--json FILE]

Four processes as a server and a trainer have them: a scheduler with full tables, SGLang's detokenizer, the HTTP server,
and the rank that trains. SGLang's own capture goes the way of SGLang's classes, sockets and JSON, as int32 in base64;
this package's goes by each store that needs nothing else but Ray, down to packed rows, read, checked and deleted. All
ways carry the routes of the same tokens, and each is checked to bring the same experts.

CPU time is of all threads of all four processes, and of Ray's. What a request costs without routes stands in a row of
its own and is taken off before ways are compared. The tokens themselves do not travel: every way would pay for them
alike. The forward pass is not there, and nothing is unpacked: the router does that, on its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.mask_codec.models import MODELS


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds, in each of which every way runs once.")] = 5,
    tokens: Annotated[list[int] | None, typer.Option(min=64, help="Of a request; again for more.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Whose shape: {', '.join(MODELS)}; again for more.")] = None,
    turns: Annotated[int, typer.Option(min=2, help="Of the conversation.")] = 50,
    conversation: Annotated[int, typer.Option(min=2048, help="Tokens of the conversation at its end.")] = 32768,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what it costs to bring routes to the trainer: SGLang's own way, and each store."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.transport.figures import Settings, measure

    settings = Settings(
        rounds=rounds,
        tokens=tuple(tokens or (2048, 32768, 131072)),
        models=tuple(model or ("Qwen3-30B-A3B", "DeepSeek-V3")),
        turns=turns,
        conversation=conversation,
    )
    measure(settings, json_file)


if __name__ == "__main__":
    typer.run(main)
