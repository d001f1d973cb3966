"""The subcommand `r3 report`: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files of a run (.safetensors, .jsonl, .jsonl.gz), or folders of them.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file; replaced if it exists.")] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Mismatch between rollout and trainer",
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", help="Name of a trainer pass to show; may be given again. Default: all.", metavar="NAME"
        ),
    ] = None,
    taus: Annotated[
        list[float] | None,
        typer.Option(
            "--tau", help="Threshold of F(tau) for the table, above 1; may be given again. Default: 1.01 1.1 1.5 2."
        ),
    ] = None,
    step_means: Annotated[
        str, typer.Option(help='What a step is in this run, to end the sentence "A step is ...".')
    ] = "what the run numbered as one",
) -> None:
    """Write one HTML page about how far rollout and trainer are apart in a run.

    Trainers write a run's steps as safetensors files, with router_replay.run.write_step. Any other program writes JSON
    lines, one sequence a line, of which routes and masks may be left out:

    \b
    {"step": 0, "group": 7, "response_mask": [0, 1, ...],
     "rollout_logprobs": [...], "trainer_logprobs": {"old": [...]},
     "rollout_masks": meta_info["routing_masks"], "trainer_routes": [...]}
    """  # noqa: D301, the backspace keeps typer from wrapping the lines after it
    # Here and not above: --help need not wait for torch and matplotlib.
    from router_replay.errors import DataError
    from router_replay.mismatch.figures.diagnostics import DEFAULT_TAUS
    from router_replay.report.page import write_report
    from router_replay.report.shared_steps import SharedSteps
    from router_replay.report.summary import summarize
    from router_replay.report.table import warnings
    from router_replay.report.target import require_target
    from router_replay.run.reading import find_files, read_run

    console, errors = Console(), Console(stderr=True)
    if taus and min(taus) <= 1:
        raise typer.BadParameter(
            f"must be above 1, got {min(taus):g}: max(r, 1/r) is never below 1", param_hint="--tau"
        )
    try:
        files = find_files(paths)
        require_target(out, files)
        shared = SharedSteps()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True) as progress:
            bar = progress.add_task("reading", total=len(files))
            steps = read_run(files, lambda path: progress.advance(bar), shared.add)
            summary = summarize(steps, passes=passes or (), taus=tuple(taus or DEFAULT_TAUS))
        # Names alone: a page that is passed on need not tell where it was made.
        names = [
            f"{path.resolve().name} ({len(find_files([path]))} files)" if path.is_dir() else path.name for path in paths
        ]
        notes = tuple(shared.warnings())
        with errors.status("drawing"):
            write_report(summary, out, title=title, inputs=names, step_means=step_means, notes=notes)
    except (DataError, OSError) as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    for warning in (*notes, *warnings(summary)):
        errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for name, figures in summary.passes.items():
        found = figures.diagnostics
        console.print(
            f"{name}: KL (k3) {found.k3:.3e} nats per token over {found.num_tokens:,} tokens in"
            f" {len(summary.steps):,} steps",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False, soft_wrap=True)
