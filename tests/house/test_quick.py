"""`make quick` runs what needs no engine, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from tests.house.repository import ROOT, files_of, imports_of

# Importing one of these imports an engine.
WITH_AN_ENGINE = (
    "sglang",
    "megatron",
    "megatron_router_replay",
    "hf_router_replay",
    "cpu_engines.megatron",
    "selenium",
)


def engine_tests() -> list[Path]:
    """Folders and files that the Makefile keeps out of `quick`."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = re.findall(r"^(?:SERVER|SLOW)_TESTS := (.*)$", text, re.MULTILINE)
    assert len(listed) == 2
    return [ROOT / each for line in listed for each in line.split()]


def test_what_is_left_out_is_there() -> None:
    assert len(engine_tests()) > 1
    assert [path for path in engine_tests() if not path.exists()] == []


def test_no_quick_test_imports_an_engine() -> None:
    left_out = engine_tests()
    quick = [path for path in files_of("tests") if not any(path.is_relative_to(each) for each in left_out)]
    assert len(quick) > 40
    found = [
        str(each)
        for path in quick
        for each in imports_of(path)
        if any(each.target == name or each.target.startswith(name + ".") for name in WITH_AN_ENGINE)
    ]
    assert not found, "add the folder to SLOW_TESTS in the Makefile:\n" + "\n".join(found)
