"""The examples of a document that run as they stand: python blocks behind the comment `<!-- run -->`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_MARK = re.compile(r"^<!-- run -->$", re.MULTILINE)
_BLOCK = re.compile(r"\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """README and the pages of docs/ that have such examples."""
    return [
        path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "<!-- run" in path.read_text()
    ]


def examples(text: str) -> Iterator[tuple[int, str]]:
    """Line number and code of each example.

    Raises:
        ValueError: a mark with something else behind it, or one that is written in another way.
    """
    if text.count("<!-- run") != len(_MARK.findall(text)):
        raise ValueError("a mark of an example is a line of its own, <!-- run -->")
    for mark in _MARK.finditer(text):
        block = _BLOCK.match(text, mark.end())
        line = text.count("\n", 0, mark.start()) + 1
        if block is None:
            raise ValueError(f"line {line}: the mark of an example has no python block behind it")
        yield line + 2, block[1]


def run(path: Path) -> dict[str, Any]:
    """Run the examples of a document, one after the other in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in examples(path.read_text()):
        # With lines in front, an error names the line of the document.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
    return namespace
