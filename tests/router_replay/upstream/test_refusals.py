"""A table of settings: refused values, settings that are gone, settings that other releases have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from router_replay.errors import SeamError, UnsupportedError
from router_replay.upstream import Reader, Refusal, check_settings, refuse
from tests.router_replay.upstream.fake_engine import LEDGER

ROW = Refusal(
    "deep engines",
    "core.Config.depth",
    lambda value: value < 4,
    "rows would drown",
    "set it to 3",
)
GONE = (
    "fake_engine.core.Config: expected a setting {name!r}, found none. It is read to refuse deep engines and needed"
    " because rows would drown."
)


def test_a_value_that_is_refused(folder: Path) -> None:
    refuse(LEDGER, [ROW], SimpleNamespace(depth=3))
    with pytest.raises(UnsupportedError) as caught:
        refuse(LEDGER, [ROW], SimpleNamespace(depth=4))
    assert str(caught.value) == "the test cannot run where depth is 4: rows would drown; set it to 3"
    with pytest.raises(UnsupportedError, match=r"where --depth is 4:"):
        refuse(LEDGER, [replace(ROW, flag="--depth")], SimpleNamespace(depth=4))


def test_every_setting_that_is_gone_is_named(folder: Path) -> None:
    rows = [ROW, replace(ROW, path="core.Config.width", only_with=("wet",))]
    with pytest.raises(SeamError) as caught:
        refuse(LEDGER, rows, SimpleNamespace(width=9))
    assert str(caught.value).split("\n")[1:-1] == [f"  {GONE.format(name=name)}" for name in ("depth", "wet")]


def test_two_settings_together(folder: Path) -> None:
    row = replace(ROW, only_with=("wet", "cold"))
    refuse(LEDGER, [row], SimpleNamespace(depth=4, wet=False, cold=None))
    refuse(LEDGER, [row], SimpleNamespace(depth=3, wet=True, cold=None))
    with pytest.raises(UnsupportedError, match="where depth is 4 with wet True: rows would drown"):
        refuse(LEDGER, [row], SimpleNamespace(depth=4, wet=True, cold=None))


def test_a_setting_of_other_releases(folder: Path) -> None:
    refuse(LEDGER, [replace(ROW, releases=">=2")], SimpleNamespace())
    with pytest.raises(SeamError, match="expected a setting 'depth', found none"):
        refuse(LEDGER, [replace(ROW, releases=">=1")], SimpleNamespace())


@pytest.mark.parametrize("release", [None, "2.0rc1", "2.1.dev3", "a-checkout"])
def test_a_setting_counts_in_releases_that_nobody_knows(release: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the path has no release, and a pre-release has what the release will have."""
    monkeypatch.setattr("router_replay.upstream.refusals.Installed", lambda name: SimpleNamespace(release=release))
    row = replace(ROW, releases=">=2")
    with pytest.raises(UnsupportedError, match="where depth is 4"):
        refuse(LEDGER, [row], SimpleNamespace(depth=4))
    if release in (None, "a-checkout"):
        # Which of the releases it is cannot be told, so a field that only some have may be missing.
        refuse(LEDGER, [row], SimpleNamespace())
    else:
        with pytest.raises(SeamError, match="expected a setting 'depth'"):
            refuse(LEDGER, [row], SimpleNamespace())


def test_settings_are_read_where_they_are_declared(reader: Reader) -> None:
    """A class-level value without an annotation is no field: SGLang keeps derived settings so."""
    rows = [ROW, replace(ROW, path="core.Config.height"), replace(ROW, path="core.Confg.depth")]
    derived = replace(ROW, path="core.Kind.SLOW")
    assert check_settings(LEDGER, rows, reader) == [
        GONE.format(name="height"),
        GONE.format(name="depth").replace("Config", "Confg"),
    ]
    assert len(check_settings(LEDGER, [derived], reader)) == 1
