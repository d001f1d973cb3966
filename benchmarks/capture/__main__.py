"""What capture costs the server: throughput, time to first token, and the scheduler's pause when a request ends.

    python -m benchmarks.capture [--json FILE]

SGLang's real server on the CPU five times: without capture, with SGLang's own, with this package's in both formats, and
without once more, which tells the noise. All of them run at once and idle in turns: each round sends the same requests
to one after the other. The pause at the end of a long request is that of the recorder alone, at a released model's
shape, since no such request fits a server here. A CPU's forward pass is far dearer beside everything else than a GPU's,
so look at the pause and at the CPU time for what capture itself takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of requests to each server.")] = 9,
    requests: Annotated[int, typer.Option(min=1, help="Requests in a round, all at once.")] = 12,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of each request.")] = 96,
    new_tokens: Annotated[int, typer.Option(min=2, help="That each request samples.")] = 64,
    pause_tokens: Annotated[int, typer.Option(min=64, help="Of the request that ends.")] = 32768,
    model: Annotated[str, typer.Option(help="Whose shape the pause is measured at.")] = "Qwen3-30B-A3B",
    served: Annotated[Path, typer.Option(help="Folder of the model that the servers have.")] = Path(
        "examples/small_model/checkpoint"
    ),
    pause_only: Annotated[bool, typer.Option("--pause-only", help="Start no servers.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure what capture costs SGLang's server on the CPU, beside SGLang's own capture."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.capture.figures import measure
    from benchmarks.capture.serving import Load

    load = Load(requests, prompt_tokens, new_tokens)
    measure(rounds, load, pause_tokens, model, None if pause_only else served, json_file)


if __name__ == "__main__":
    typer.run(main)
