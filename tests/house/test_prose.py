"""How the words in the code are written: docstrings are sentences that stand alone, in one style."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.repository import AROUND, PRODUCT, ROOT, files_of, tree_of

DOUBLE_BACKTICK = re.compile(r"(?<!`)`{2}(?!`)")
SPHINX_ROLE = re.compile(r"(?<![\w:]):[a-z]+(?::[a-z]+)*:`")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
# Folders of one person or one machine; `/root` and `/home` alone may be a container's.
OWN_FOLDER = re.compile(r"(?<![\w.$])/(?:home|Users|root|work)/\w")

TEXTS = (".py", ".h", ".cpp", ".cu", ".sh", ".md", ".toml", ".txt")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of a module and of its public classes, functions and methods."""
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while waiting:
        node = waiting.pop()
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text
        # What is inside a function is nobody's to call.
        if isinstance(node, ast.Module | ast.ClassDef):
            waiting += [
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not child.name.startswith("_")
            ]


def complaint(docstring: str) -> str | None:
    """What is wrong with a docstring's beginning, or None: it has to be a sentence, up to its first empty line."""
    first = docstring.partition("\n\n")[0].strip()
    if not (first[0].isupper() or first[0] == "`"):
        return "begins with neither a capital letter nor a backtick"
    if first[-1] not in ".:?":
        return "its first paragraph ends with none of . : ?"
    if len(first.split()) < 3:
        return "says no more than a name"
    return None


def _written_files() -> list[Path]:
    folders = (*PRODUCT, *AROUND, "csrc", "scripts", "docs")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(
        path
        for path in [*ROOT.iterdir(), *inside]
        if path.is_file() and (path.suffix in TEXTS or path.name == "Makefile")
    )


def _found(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_public_docstrings_are_sentences() -> None:
    files = files_of(*PRODUCT)
    assert len(files) > 50
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {why}: {text.splitlines()[0]}"
        for path in files
        for line, text in docstrings(tree_of(path))
        if (why := complaint(text))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (DOUBLE_BACKTICK, "names stand in single backticks"),
        (SPHINX_ROLE, "names stand in backticks without a role"),
    ],
    ids=["double backticks", "roles"],
)
def test_names_are_quoted_in_one_way(pattern: re.Pattern[str], rule: str) -> None:
    found = _found(pattern, files_of(*PRODUCT, *AROUND))
    assert not found, f"{rule}, but\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (UNFINISHED, "what is not done is not announced in the code"),
        (OWN_FOLDER, "no file knows the folders of one machine"),
    ],
    ids=["unfinished", "own folders"],
)
def test_files_say_nothing_of_their_making(pattern: re.Pattern[str], rule: str) -> None:
    found = _found(pattern, _written_files())
    assert not found, f"{rule}, but\n" + "\n".join(found)


# --- the checks themselves ------------------------------------------------------------------------------------------


def test_every_docstring_that_others_read_is_looked_at() -> None:
    tree = ast.parse(
        '"""Module."""\n'
        'class A:\n    """Class."""\n    def f(self):\n        """Method."""\n    def _g(self):\n        """hidden"""\n'
        '    class B:\n        """Inner."""\n'
        'class _C:\n    """hidden"""\n    def f(self):\n        """hidden"""\n'
        'def f():\n    """Function."""\n    def g():\n        """hidden"""\n'
        'async def h():\n    """Coroutine."""\n'
    )
    found = [text for _, text in sorted(docstrings(tree))]
    assert found == ["Module.", "Class.", "Method.", "Inner.", "Function.", "Coroutine."]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The rows of a sequence.", None),
        ("`rows` of a sequence, in order:\n\n    rows = f()", None),
        ("A sentence that goes on\nin its second line.", None),
        ("the rows of a sequence.", "begins with neither"),
        ("The rows of a sequence", "ends with none"),
        ("The rows\n\nof a sequence.", "ends with none"),
        ("The shares.\n\nOf all.", "no more than a name"),
    ],
)
def test_a_sentence_is_told_from_what_is_none(text: str, words: str | None) -> None:
    found = complaint(text)
    assert found is None if words is None else words in str(found)


@pytest.mark.parametrize(
    ("pattern", "caught", "let_through"),
    [
        (DOUBLE_BACKTICK, "see `" + "`rows`" + "`", "see `rows`, and ```python"),
        (SPHINX_ROLE, ":py:class" + ":`Masks` and :meth" + ":`join`", "one of two: `rows` or ids[a:b]:`"),
        (UNFINISHED, "# TO" + "DO: later", "what is to do"),
        (OWN_FOLDER, "/ho" + "me/someone/file", "https://host.example/home/page and $HOME/file, ./work/x"),
    ],
    ids=["double backticks", "roles", "unfinished", "own folders"],
)
def test_patterns_catch_what_they_should(pattern: re.Pattern[str], caught: str, let_through: str) -> None:
    assert pattern.search(caught)
    assert not pattern.search(let_through)
