"""Lines that a user adds for a stack: what docs/adapters.md shows, what its table counts, what `r3 doctor` asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from router_replay_adapters.stacks import STACKS
from tests.docs.examples import ROOT

PAGE = (ROOT / "docs" / "adapters.md").read_text()
MARK = "<!-- lines -->"
MOST = 10


@dataclass(frozen=True)
class Block:
    """What a user adds in one way of using a stack.

    Attributes:
        stack: in prose, as its section and its row of the table begin.
        lines: without comments.
    """

    stack: str
    lines: tuple[str, ...]


def _blocks() -> Iterator[Block]:
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        stack = re.split(r"[,\n]", section, maxsplit=1)[0]
        for code in re.findall(rf"^{MARK}\n```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            plain = [re.sub(r"(^|\s+)#.*", "", line) for line in code.splitlines()]
            yield Block(stack, tuple(line for line in plain if line))


def _rows() -> Iterator[tuple[str, str]]:
    """Stack, without its release, and what its row of the first table says of lines."""
    head, *rows = re.findall(r"^\| (.*) \|$", PAGE.split("\n\nLines are", 1)[0], re.MULTILINE)
    column = head.split(" | ").index("lines")
    for row in rows:
        cells = row.split(" | ")
        yield re.split(r"[ ,]", cells[0])[0], cells[column]


BLOCKS = list(_blocks())
ROWS = list(_rows())


def test_every_mark_has_its_block() -> None:
    assert PAGE.count(MARK) == len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.stack)
def test_a_stack_takes_ten_lines_at_most(block: Block) -> None:
    assert 1 <= len(block.lines) <= MOST


def test_the_table_counts_the_lines() -> None:
    assert {stack for stack, _ in ROWS} >= {stack.title.split(",")[0] for stack in STACKS.values()}
    assert {block.stack for block in BLOCKS} <= {stack for stack, _ in ROWS}
    for stack, said in ROWS:
        counted = [len(block.lines) for block in BLOCKS if block.stack == stack]
        assert [int(number) for number in re.findall(r"\d+", said)] == counted, stack


def test_the_doctor_asks_for_the_lines_of_the_page() -> None:
    """Whatever is no installation is a variable or an argument of the doctor's table, and the other way round."""
    titles = {stack.title.split(",")[0] for stack in STACKS.values()}
    shown = [
        (block.stack, sorted(line.removeprefix("export ") for line in block.lines if not line.startswith("pip ")))
        for block in BLOCKS
        if block.stack in titles
    ]
    asked = [
        (
            stack.title.split(",")[0],
            sorted([*(f"{name}={value}" for name, value in stack.variables.items()), *stack.arguments]),
        )
        for stack in STACKS.values()
        if stack.adapter is not None
    ]
    assert sorted(shown) == sorted(asked)
