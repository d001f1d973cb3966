"""Two readers, one ledger: what fits and what does not is the same by import and by source."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from router_replay.errors import SeamError
from router_replay.upstream import At, Attribute, Reader, Source, check, require
from router_replay.upstream.check import path_in
from tests.router_replay.upstream.fake_engine import FILES, ledger_of, seam

HOOKED = "hooked by tests.here"
RELIED = "relied on by tests.here"


def test_release_is_the_distributions(reader: Reader) -> None:
    assert reader.release == "1.2.3"


@pytest.mark.parametrize(
    ("where", "parameters", "use"),
    [
        ("core.Engine", None, "read by tests.here"),
        ("core.Engine.step", ("batch", "graph"), HOOKED),
        ("core.Engine.step", ("batch",), "called by tests.here"),
        ("core.Engine.build", ("args",), "called by tests.here"),
        ("core.Engine.flags", ("parser",), HOOKED),
        ("core.Engine.ids", None, "read by tests.here"),
        ("core.Engine.__init__", ("config", "*", "device"), RELIED),
        ("core.Engine.shared", ("first", "second"), "called by tests.here"),
        ("core.Engine.size", None, "read by tests.here"),
        ("core.Other.shared", ("first",), RELIED),
        ("core.Config.depth", None, "read by tests.here"),
        ("core.Config.width", None, "read by tests.here"),
        ("core.Kind.SLOW", None, "read by tests.here"),
        ("core.VALUE", None, "read by tests.here"),
        ("core.run", ("batch", "graph", "*", "device"), "called by tests.here"),
        ("core.run", ("batch", "*", "level", "device", "graph"), "called by tests.here"),
        ("core.run", (), HOOKED),
        ("core.go", ("batch", "graph", "*", "device"), "called by tests.here"),
        ("core.speed", ("value",), "called by tests.here"),
        ("exports.Engine.step", ("batch",), "called by tests.here"),
        ("start", ("batch", "graph", "*", "device"), "called by tests.here"),
    ],
)
def test_what_fits(reader: Reader, where: str, parameters: tuple[str, ...] | None, use: str) -> None:
    assert check(ledger_of(seam(where, parameters, use)), reader) == []


@pytest.mark.parametrize(
    ("where", "parameters", "use", "expected", "found"),
    [
        ("core.Engine.stride", ("batch",), HOOKED, "parameters (batch)", "nothing of that name"),
        ("core.Engines", None, "read by tests.here", "that name", "nothing of that name"),
        ("cores.Engine", None, "read by tests.here", "that name", "nothing of that name"),
        ("core.Config.height", None, "read by tests.here", "that name", "nothing of that name"),
        ("core.Kind.FAST", None, "read by tests.here", "that name", "nothing of that name"),
        ("core.Engine.step", ("graph", "batch"), HOOKED, "parameters (graph, batch)", "parameters (batch, graph=...)"),
        ("core.Engine.step", ("batch", "more"), HOOKED, "parameters (batch, more)", "parameters (batch, graph=...)"),
        ("core.run", ("batch", "*", "device"), "called by tests.here", "parameters (batch, *, device)", "parameters ("),
        ("core.run", ("*", "batch"), RELIED, "parameters (*, batch)", "parameters (batch, /, graph, *extra, device, "),
        ("core.run", (), "called by tests.here", "a function that asks for no parameters", "parameters (batch, /"),
        ("core.VALUE", (), HOOKED, "a function", "something that is no function"),
        ("core.Engine.stub", (), HOOKED, "a function", "nothing of that name but what Base bequeaths"),
        ("core.Engine.shared", (), "wrapped by tests.here", "a function", "nothing of that name but what Base beq"),
    ],
)
def test_what_does_not_fit(
    reader: Reader, where: str, parameters: tuple[str, ...] | None, use: str, expected: str, found: str
) -> None:
    (problem,) = check(ledger_of(seam(where, parameters, use)), reader)
    assert problem.path == f"fake_engine.{where}"
    assert problem.expected == expected
    assert problem.found.startswith(found)


def test_added_keywords_stop_nobody_and_added_demands_only_who_calls(folder: Path) -> None:
    row = seam("core.Engine.step", ("batch",), "called by tests.here")
    core = folder / "fake_engine" / "core.py"
    core.write_text(core.read_text().replace("graph=False", "graph=False, *, new=None"))
    assert check(ledger_of(row), Source(folder, "fake-engine")) == []
    core.write_text(core.read_text().replace("new=None", "new"))
    (problem,) = check(ledger_of(row), Source(folder, "fake-engine"))
    assert problem.found == "parameters (batch, graph=..., *, new)"
    assert check(ledger_of(replace(row, use=HOOKED)), Source(folder, "fake-engine")) == []


@pytest.mark.parametrize(
    ("places", "found_at"),
    [
        ((At("core.Engine.leap", ">=2"), At("core.Engine.step", "<2")), "core.Engine.step"),
        ((At("core.Engine.leap", ">=1.2"), At("core.Engine.step", ">=1.1")), "core.Engine.step"),
        ((At("core.Engine.step", ">=1.2.3"), At("core.Engine.leap", "<1.2.3")), "core.Engine.step"),
        ((At("core.Engine.leap", ">=2"),), None),
    ],
    ids=["older", "either", "newer", "not needed yet"],
)
def test_a_name_by_release(reader: Reader, places: tuple[At, ...], found_at: str | None) -> None:
    row = replace(seam("core", ("batch",), HOOKED), where=places)
    ledger = ledger_of(row)
    assert check(ledger, reader) == []
    assert path_in(ledger, row, reader) == (f"fake_engine.{found_at}" if found_at else None)


def test_a_name_that_is_at_none_of_its_places(reader: Reader) -> None:
    places = (At("core.Engine.leap", ">=1.2"), At("core.Engine.jump", ">=1"), At("core.Engine.step", "<1.2"))
    row = replace(seam("core", ("batch",), HOOKED), where=places)
    (problem,) = check(ledger_of(row), reader)
    assert problem.path == "fake_engine.core.Engine.leap"
    assert path_in(ledger_of(row), row, reader) is None


def test_a_folder_that_was_never_installed(folder: Path) -> None:
    """Megatron-LM is often put on the path as a checkout: any place of a row will do then."""
    for file in (folder / "fake_engine-1.2.3.dist-info").iterdir():
        file.unlink()
    (folder / "fake_engine-1.2.3.dist-info").rmdir()
    row = replace(seam("core", None), where=(At("core.Engine.leap", ">=2"), At("core.Engine.step", "<2")))
    reader = Source(folder, "fake-engine")
    assert reader.release is None
    assert check(ledger_of(row), reader) == []
    with pytest.raises(SeamError, match="installed Fake Engine of an unknown release"):
        require(ledger_of(seam("core.Engines", None)), reader)


def test_every_problem_is_told_at_once(reader: Reader) -> None:
    rows = (seam("core.Engine.stride", ("a",)), seam("core.run", ("batch", "graph", "*", "device")), seam("gone", None))
    with pytest.raises(SeamError) as caught:
        require(ledger_of(*rows), reader)
    lines = str(caught.value).split("\n")
    assert lines[0] == "the test does not fit the installed Fake Engine 1.2.3 (fake-engine):"
    assert [line.split(": ")[0].strip() for line in lines[1:-1]] == [
        "fake_engine.core.Engine.stride",
        "fake_engine.gone",
    ]
    assert lines[-1] == (
        "This is tested with Fake Engine 1.2.3; names and parameters also fit 1.2.2. Install one of these, or do"
        " without."
    )


@pytest.mark.parametrize(("name", "there"), [("config", True), ("size", True), ("ids", True), ("colour", False)])
def test_attributes_are_seen_in_the_source(folder: Path, name: str, there: bool) -> None:
    attribute = Attribute("core.Engine", name, "read by tests.here", "the test says so", "tests/x.py::test_x")
    problems = check(replace(ledger_of(), attributes=(attribute,)), Source(folder, "fake-engine"))
    assert [str(problem) for problem in problems] == (
        []
        if there
        else [
            f"fake_engine.core.Engine.{name}: expected that attribute, found nothing in the class that sets it. It is"
            " read by tests.here and needed because the test says so."
        ]
    )


def test_an_assignment_does_not_hide_the_class_that_it_completes(folder: Path) -> None:
    """SGLang's ServerArgs is a class that is assembled into another of the same name."""
    core = folder / "fake_engine" / "core.py"
    core.write_text(FILES["fake_engine/core.py"] + "Engine = dataclass(Engine)\n")
    assert check(ledger_of(seam("core.Engine.step", ("batch",))), Source(folder, "fake-engine")) == []


def test_an_import_of_something_else_is_no_name_of_this_distribution(folder: Path) -> None:
    (problem,) = check(ledger_of(seam("core.dataclass", None)), Source(folder, "fake-engine"))
    assert problem.found == "an import of dataclass from dataclasses, which is not part of this distribution"


@pytest.mark.parametrize("use", ["patched by tests.here", "hooked in tests.here", "relied by tests.here", "read by"])
def test_a_use_that_would_not_read_as_a_sentence(use: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"not {use!r}")):
        seam("core", None, use)
