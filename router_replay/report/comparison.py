"""The page about several runs side by side: how training went in each, and how far its two sides are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from router_replay.files import write_whole
from router_replay.report.dynamics import RunDynamics
from router_replay.report.page import document, origin, section_html, table_html, warning_list
from router_replay.report.sections import dynamics_section
from router_replay.report.summary import RunSummary
from router_replay.report.table import rows, warnings

Runs = Sequence[tuple[str, RunSummary]]
"""Names and summaries; runs of one name are seeds of one setting."""


def write_comparison(
    runs: Runs,
    path: Path,
    *,
    title: str,
    inputs: Sequence[str] = (),
    step_means: str = "what the runs numbered as one",
    notes: Sequence[str] = (),
) -> None:
    """Write the page of several runs; arguments and errors as of `router_replay.report.page.write_report`."""
    text = comparison_page(runs, title=title, inputs=inputs, step_means=step_means, notes=notes)
    write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def comparison_page(runs: Runs, *, title: str, inputs: Sequence[str], step_means: str, notes: Sequence[str]) -> str:
    """The page's text; whatever comes from the runs is escaped."""
    tokens = sum(next(iter(summary.passes.values())).diagnostics.num_tokens for _, summary in runs)
    facts = f"{len(runs)} runs; {tokens:,} response tokens."
    told = [f"{name}: {warning}" for name, summary in runs for warning in warnings(summary)]
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="facts">{escape(facts)} r3 report with one of the runs alone shows its mismatch in full.</p>',
            warning_list([*notes, *told]),
            section_html(dynamics_section([RunDynamics.of(name, summary) for name, summary in runs], step_means)),
            "<section><h2>Trainer against rollout</h2>",
            table_html("diagnostics", ["over all steps", *_columns(runs)], list(_figures(runs))),
            "</section>",
            f"<footer><p>{escape(origin(inputs))}</p></footer>",
        ],
    )


def _columns(runs: Runs) -> Iterator[str]:
    for name, summary in runs:
        yield f"{name}: {next(iter(summary.passes))}"


def _figures(runs: Runs) -> Iterator[list[str]]:
    """A row for each diagnostic that some run has, with a cell for each run's first trainer pass."""
    of_runs: list[Mapping[str, str]] = [{row.name: row.cells[0] for row in rows(summary)} for _, summary in runs]
    for name in dict.fromkeys(name for cells in of_runs for name in cells):
        yield [name, *(cells.get(name, "none") for cells in of_runs)]
