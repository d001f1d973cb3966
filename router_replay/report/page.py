"""The report: one HTML file that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import importlib.metadata
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from router_replay.files import write_whole
from router_replay.report.sections import Section, sections
from router_replay.report.summary import RunSummary
from router_replay.report.table import rows, warnings

_DPI = 144
_PACKAGES = ("rollout-routing-replay", "torch", "matplotlib", "safetensors")

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
.facts, footer { color: #595959; font-size: 0.875rem; }
.warnings { border-left: 4px solid #D55E00; background: #fdf3ec; padding: 0.5rem 1rem 0.5rem 2rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
td[colspan] { text-align: center; }
tr > :first-child { text-align: left; font-weight: 600; padding-left: 0; }
th small { display: block; font-weight: 400; color: #595959; }
figure { margin: 0.5rem 0 0; }
.plot { overflow-x: auto; }
.plot img { display: block; max-width: 100%; height: auto; }
@media screen and (max-width: 40rem) { .plot img { max-width: none; width: 40rem; } }
figcaption, .missing { font-size: 0.95rem; max-width: 54rem; }
.missing { border-left: 4px solid #767676; padding-left: 1rem; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } section, figure { break-inside: avoid; } }
"""


def write_report(
    summary: RunSummary,
    path: Path,
    *,
    title: str = "Mismatch between rollout and trainer",
    inputs: Sequence[str] = (),
    step_means: str = "what the run numbered as one",
    notes: Sequence[str] = (),
) -> None:
    """Write the page of a run; a reader never sees half of it.

    Args:
        path: the HTML file; replaced if it exists.
        inputs: what the run was read from, as it shall be told.
        step_means: what a step is in this run, to end the sentence "A step is ...".
        notes: warnings about the files, to be shown before those about the figures.

    Raises:
        OSError: the file cannot be written.
    """
    text = html_page(summary, title=title, inputs=inputs, step_means=step_means, notes=notes)
    write_whole(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))


def html_page(summary: RunSummary, *, title: str, inputs: Sequence[str], step_means: str, notes: Sequence[str]) -> str:
    """The page's text; arguments as of `write_report`. Whatever comes from the run is escaped."""
    first, last = summary.steps[0].step, summary.steps[-1].step
    span = f"step {first}" if len(summary.steps) == 1 else f"{len(summary.steps):,} steps, {first} to {last}"
    tokens = max(figures.diagnostics.num_tokens for figures in summary.passes.values())
    facts = f"{span}; {tokens:,} response tokens; trainer passes: {', '.join(summary.passes)}."
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="facts">{escape(facts)} Logarithms are natural; r is the probability under the trainer over that'
        " under the rollout, for the tokens that the rollout sampled.</p>",
        warning_list([*notes, *warnings(summary)]),
        _table(summary),
        *(section_html(each) for each in sections(summary, step_means)),
        f"<footer><p>{escape(origin(inputs))}</p></footer>",
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """A whole page of a heading and HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            # Browsers ask for an icon that a page does not have.
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def warning_list(found: Sequence[str]) -> str:
    """Sentences as a list that stands out; nothing where there are none."""
    if not found:
        return ""
    return '<ul class="warnings" role="note">' + "".join(f"<li>{escape(each)}</li>" for each in found) + "</ul>"


def _table(summary: RunSummary) -> str:
    names = list(summary.passes)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows(summary):
        # What holds for all passes has one cell.
        span = f' colspan="{len(names)}"' if len(row.cells) < len(names) else ""
        cells = "".join(f"<td{span}>{escape(cell)}</td>" for cell in row.cells)
        lines.append(f'<tr><th scope="row">{escape(row.name)}<small>{escape(row.meaning)}</small></th>{cells}</tr>')
    return (
        '<div class="scroll"><table id="diagnostics"><thead><tr><th scope="col">trainer against rollout</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def table_html(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first of each row its name."""
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(each)}</td>" for each in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def section_html(section: Section) -> str:
    """A plot with its words, and its table above it."""
    heading = f"<h2>{escape(section.title)}</h2>"
    if section.table is not None:
        heading += table_html(f"{section.name}-table", *section.table)
    if section.figure is None:
        return f'<section>{heading}<p class="missing" id="{section.name}">{escape(section.caption)}</p></section>'
    picture = io.BytesIO()
    section.figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    data = base64.b64encode(picture.getvalue()).decode("ascii")
    return (
        f'<section>{heading}<figure id="{section.name}">'
        f'<div class="plot"><img src="data:image/png;base64,{data}" alt="{escape(section.alternative)}"></div>'
        f"<figcaption>{escape(section.caption)}</figcaption></figure></section>"
    )


def origin(inputs: Sequence[str]) -> str:
    """What the page was made from, and with what."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    made = f"Made with {', '.join(versions)}."
    return f"From {', '.join(inputs)}. {made}" if inputs else made
