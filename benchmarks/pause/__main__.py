"""The scheduler's pause when long requests end, in the running server under load, and what others wait for it.

    python -m benchmarks.pause [--json FILE]

SGLang's real server on the CPU, one after the other: with SGLang's own capture, and with this package and a store in
the answer, in memory, and one in memory that takes its time for each request. A plugin in the scheduler's process times
what its thread does.

What is served: requests of 32k tokens of a released model's geometry. The model is its routers and nothing else, since
a CPU computes no attention over so many tokens; its rows have the released model's size. All long requests share their
beginning, which is computed once; each of them has all of its rows gathered when it ends. They run as one batch and end
in one step. Short requests without routes arrive all the while, on a fixed schedule.

What is measured: the *pause*, wall and CPU time of the scheduler's thread from taking a request's routes to having sent
the batch's answers, for one request that ends and for many that end together; the largest time that a later change of
the slot table took in a step, since this package leaves the copying of rows to another thread unless their slots change
before it has come to it; and the time to the first token of the short requests that arrive in the seconds after an end,
beside those after the same end without routes, twice, which tells the noise, and while no long request is there. The
first token passes through the process that writes the answers, too, which SGLang's own capture and the store in the
answer load with text.

What is not: a GPU's forward pass, beside which the scheduler's thread waits; the copies from and to a device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all phases with each server.")] = 5,
    tokens: Annotated[int, typer.Option(min=1024, help="Of a long request.")] = 32768,
    together: Annotated[int, typer.Option(min=1, help="Long requests that end together.")] = 32,
    stock_together: Annotated[
        int, typer.Option(min=1, help="The same for SGLang's own capture, whose answers take 100 MB each and more.")
    ] = 8,
    single: Annotated[int, typer.Option(min=1, help="Long requests of a round that end alone.")] = 4,
    window: Annotated[float, typer.Option(min=0.1, help="Seconds after an end in which others are looked at.")] = 4.0,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between short requests.")] = 0.15,
    slow: Annotated[float, typer.Option(min=0.0, help="Seconds that the slow store takes for a request.")] = 0.5,
    model: Annotated[str, typer.Option(help="Whose geometry the served model has.")] = "Qwen3-30B-A3B",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Measure the scheduler's pause at the end of long requests, beside SGLang's own capture."""
    # Here and not above: `--help` need not wait for torch.
    from benchmarks.pause.figures import measure
    from benchmarks.pause.servers import Sizes

    sizes = Sizes(tokens, together, single, window, interval, slow)
    measure(rounds, sizes, stock_together, model, json_file)


if __name__ == "__main__":
    typer.run(main)
