"""The subcommand `r3 report`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files of a run (.safetensors, .jsonl, .jsonl.gz), or folders of them. Each of several folders is a"
            " run of its own.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file; replaced if it exists.")] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Mismatch between rollout and trainer",
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="Name of a run, once for each path, which is a run of its own then; seeds of one setting have one"
            " name. Default: the folder's.",
        ),
    ] = None,
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
    """Write one HTML page about a run: how training goes, and how far rollout and trainer are apart.

    Several folders, or paths with a --name for each, are runs that are shown side by side.

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
    from router_replay.report.comparison import write_comparison
    from router_replay.report.page import write_report
    from router_replay.report.runs import named_runs
    from router_replay.report.shared_steps import SharedSteps
    from router_replay.report.summary import RunSummary, summarize
    from router_replay.report.table import warnings
    from router_replay.report.target import require_target
    from router_replay.run.reading import find_files, read_tallies

    console, errors = Console(), Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if taus and min(taus) <= 1:
        raise typer.BadParameter(
            f"must be above 1, got {min(taus):g}: max(r, 1/r) is never below 1", param_hint="--tau"
        )
    if names and len(names) != len(paths):
        raise typer.BadParameter(
            f"got {len(names)} names for {len(paths)} paths: give one for each", param_hint="--name"
        )
    shown, told = tuple(passes or ()), tuple(taus or DEFAULT_TAUS)
    try:
        files_of_runs = [(name, find_files(of_run)) for name, of_run in named_runs(paths, names or ())]
        files = [path for _, each in files_of_runs for path in each]
        require_target(out, files)
        shared = SharedSteps()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        runs: list[tuple[str, RunSummary]] = []
        with Progress(*columns, console=errors, transient=True) as progress:
            bar = progress.add_task("reading", total=len(files))
            for name, each in files_of_runs:
                steps = read_tallies(each, lambda path: progress.advance(bar), shared.add, passes=shown, taus=told)
                try:
                    runs.append((name, summarize(steps, passes=shown, taus=told)))
                except DataError as error:
                    raise DataError(f"{name}: {error}" if len(files_of_runs) > 1 else str(error)) from error
        notes = tuple(shared.warnings())
        inputs = _told(paths)
        with errors.status("drawing"):
            if len(runs) == 1:
                write_report(runs[0][1], out, title=title, inputs=inputs, step_means=step_means, notes=notes)
            else:
                write_comparison(runs, out, title=title, inputs=inputs, step_means=step_means, notes=notes)
    except (DataError, OSError) as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    several = len(runs) > 1
    found = [f"{name}: {each}" if several else each for name, summary in runs for each in warnings(summary)]
    for warning in (*notes, *found):
        errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for run, summary in runs:
        for name, figures in summary.passes.items():
            said = figures.diagnostics
            say(
                f"{f'{run}, ' if several else ''}{name}: KL (k3) {said.k3:.3e} nats per token over"
                f" {said.num_tokens:,} tokens in {len(summary.steps):,} steps"
            )
    say(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def _told(paths: Sequence[Path]) -> list[str]:
    """Names alone: a page that is passed on need not tell where it was made."""
    from router_replay.run.reading import find_files

    return [
        f"{path.resolve().name} ({len(find_files([path]))} files)" if path.is_dir() else path.name for path in paths
    ]
