"""Wrapping behind an import, on a package that is written here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from router_replay.errors import SeamError
from router_replay.upstream import Ledger, Seam
from router_replay_adapters.on_import import wrap_on_import

PACKAGE = "stack_of_this_test"


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of two modules, of which the first imports a name of the second."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "early.py").write_text(f"from {PACKAGE}.late import number\n")
    (folder / "late.py").write_text("def number(one):\n    return one\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield PACKAGE
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def ledger(*parameters: str) -> Ledger:
    seam = Seam("late.number", parameters, "wrapped by on_import.wrap_on_import", "it is here", "never")
    return Ledger("pytest", "a stack", f"{PACKAGE}.", "its adapter", ("1.0",), (), "do without", (seam,))


def doubled(original: Callable[[int], int]) -> Callable[[int], int]:
    return lambda one: 2 * original(one)


def test_names_are_wrapped_before_anybody_can_import_them(stack: str) -> None:
    told: list[str] = []
    wrap_on_import(ledger("one"), f"{stack}.late", {"late.number": doubled}, told.append)
    assert told == [] and f"{stack}.late" not in sys.modules and stack not in sys.modules
    early = importlib.import_module(f"{stack}.early")
    assert early.number(3) == 6
    assert told == [f"{stack}.late"]


def test_a_module_that_is_there_is_wrapped_at_once(stack: str) -> None:
    late = importlib.import_module(f"{stack}.late")
    told: list[str] = []
    wrap_on_import(ledger("one"), f"{stack}.late", {"late.number": doubled}, told.append)
    assert late.number(3) == 6 and told == [f"{stack}.late"]


def test_an_import_raises_what_does_not_fit_whenever_it_is_tried(stack: str) -> None:
    wrap_on_import(ledger("two"), f"{stack}.late", {"late.number": doubled}, lambda name: None)
    for _ in range(2):
        with pytest.raises(SeamError, match=r"late\.number: expected parameters \(two\), found parameters \(one\)"):
            importlib.import_module(f"{stack}.early")
