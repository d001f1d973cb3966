"""Train with routes that differ, with replay and without, arm after arm, and keep what was seen.

    python -m studies.stability run                  # goes on where it stands, until every run has its result
    python -m studies.stability run --minutes 60     # for an hour: no further piece of ten steps begins after it
    python -m studies.stability status
    python -m studies.stability picture              # docs/stability*.png, from the results that are there

docs/stability.md has the design and what was seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=(__doc__ or "").partition("\n")[0], no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder of the runs that are not finished.")]
DEFAULT_OUT = Path("runs/stability")


@app.command()
def run(
    out: Out = DEFAULT_OUT,
    minutes: Annotated[float, typer.Option(min=0, help="After which no further piece of a run begins.")] = 24 * 60,
    server: Annotated[
        str | None, typer.Option(help="URL of a running SGLang in float32 with --enable-router-capture.")
    ] = None,
) -> None:
    """Go on with the study: one server, arms in turns, a result for each run that is finished.

    Several of these commands may run at once; they share the runs.
    """
    # Here and not above: `--help` need not wait for torch.
    from cpu_engines.sglang.server import ServerDiedError
    from examples.multi_turn_replay.rollout import RolloutError
    from router_replay.errors import RouterReplayError
    from studies.stability.protocol import blocks
    from studies.stability.work import work

    try:
        work(blocks(), out=out, minutes=minutes, url=server)
    except (RolloutError, RouterReplayError, ServerDiedError) as error:
        Console().print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


@app.command()
def status(out: Out = DEFAULT_OUT) -> None:
    """How far every run is."""
    from studies.stability.protocol import blocks
    from studies.stability.work import steps_done

    table = Table("run", "steps")
    for each in (each for block in blocks() for each in block):
        table.add_row(each.name, f"{steps_done(each, out)} of {each.num_steps}")
    Console().print(table)


@app.command()
def picture(
    to: Annotated[Path, typer.Option(help="The folder that the PNGs are written to.")] = Path("docs"),
) -> None:
    """Draw how training went in each arm that has a result."""
    from studies.stability.plots import PICTURES, draw

    for name, arms in PICTURES.items():
        draw(to / name, arms)
        Console().print(f"written: {to / name}", soft_wrap=True)


if __name__ == "__main__":
    app()
