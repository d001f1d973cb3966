"""The figures of soaks beside each other, as a page: `python -m tests.soak.table A.json B.json --out FILE.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from router_replay.files import write_whole
from tests.soak.answers import ORIGINS

_MIB = 2**20


def main(
    files: Annotated[list[Path], typer.Argument(help="What `python -m tests.soak --json` wrote.", exists=True)],
    out: Annotated[Path, typer.Option(help="The page.")],
) -> None:
    """Write the figures of some soaks as tables of Markdown."""
    text = page([json.loads(file.read_text()) for file in files])
    write_whole(out, lambda partial: partial.write_text(text))


def page(reports: list[dict[str, Any]]) -> str:
    """Two tables: rows, and what else happened; a column for each soak, or three."""
    names = ["SGLang's own" if report["setup"]["stock"] else "this package" for report in reports]
    lines = ["# Soaks: everything at once, every returned row checked", "", *map(_described, names, reports), ""]
    lines += _table(
        ["KV of the row", *(f"{name}: {what}" for name in names for what in ("rows", "invalid", "wrong and valid"))],
        [[origin, *_rows(reports, origin)] for origin in ("all", *ORIGINS)],
    )
    counted = dict.fromkeys(event for report in reports for event in report["events"])
    figures = {
        "seconds": [report["seconds"] for report in reports],
        "distinct (token, forward pass) pairs": [report["distinct (token, forward pass) pairs"] for report in reports],
        "sets of experts that differ by rounding": [report["near ties"]["sets"] for report in reports],
        "schedulers' resident MiB, at a tenth of the time and every fifth after": [_resident(each) for each in reports],
        **{event: [report["events"].get(event, 0) for report in reports] for event in counted},
    }
    return "\n".join(
        [*lines, "", *_table(["", *names], [[name, *map(_shown, row)] for name, row in figures.items()]), ""]
    )


def _described(name: str, report: dict[str, Any]) -> str:
    setup = ", ".join(f"{key} {value}" for key, value in report["setup"].items() if key not in ("stock", "flags"))
    machine = f"{report['hardware']['cores']}-core {report['hardware']['cpu']}"
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return f"- {name}, {report['date']}: {setup}; {machine}; {versions}"


def _rows(reports: list[dict[str, Any]], origin: str) -> list[str]:
    tables = ("rows", "invalid rows", "wrong rows marked valid")
    return [_shown(report[table].get(origin, 0)) for report in reports for table in tables]


def _resident(report: dict[str, Any]) -> str:
    sizes = [size for _, size in report["resident bytes of the schedulers"]]
    if not sizes:
        return "-"
    shares = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    return ", ".join(f"{sizes[round(share * (len(sizes) - 1))] / _MIB:.0f}" for share in shares)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]


if __name__ == "__main__":
    typer.run(main)
