"""A forked server beside the one that started from nothing: each of its processes is the same, and so is its work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpu_engines.sglang.server import Server
from tests.forked_servers.client import Keeper
from tests.sglang_router_capture.probe import HOOKED, probing, reports
from tests.sglang_router_capture.same_requests import masks_of_requests
from tests.small_model import CAPTURE_FLAGS, cpu_environment, serve

pytestmark = pytest.mark.timeout(900)

# Each start has its own.
OF_A_START = {"PROMETHEUS_MULTIPROC_DIR", "PYTEST_CURRENT_TEST", "ROUTER_CAPTURE_PROBE", "SGLANG_RUN_ID"}
ROLES = ("main", "sglang::scheduler", "sglang::detokenizer")

Report = dict[str, Any]


@pytest.fixture(scope="module")
def forked(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server as `capture_server` is, and the folder of its probes' reports."""
    folder = tmp_path_factory.mktemp("forked_probe")
    variables = probing(folder)
    keeper = Keeper(cpu_environment(variables))
    with serve(small_model, *CAPTURE_FLAGS, environment=variables, start=keeper.start) as server:
        yield server, folder
    keeper.end()


@pytest.fixture(scope="module")
def both(
    forked: tuple[Server, Path], capture_server: Server, capture_reports: Path
) -> dict[str, tuple[Report, Report]]:
    """By role of a process: what it is like in the server from nothing, and in the forked one, after the same work."""
    server, folder = forked
    assert masks_of_requests(server) == masks_of_requests(capture_server)
    # A report is written every two seconds.
    time.sleep(5)
    cold, ours = ({each["role"]: each for each in reports(each)} for each in (capture_reports, folder))
    assert sorted(cold) == sorted(ours) == sorted(ROLES)
    return {role: (cold[role], ours[role]) for role in ROLES}


def test_it_answers_as_the_other_does(forked: tuple[Server, Path], capture_server: Server) -> None:
    found = masks_of_requests(forked[0])
    assert len(found) == 6
    assert found == masks_of_requests(capture_server)


def _but_its_port(command: list[str]) -> list[str]:
    number = command.index("--port") + 1
    return command[:number] + command[number + 1 :]


@pytest.mark.parametrize("role", ROLES)
def test_each_process_has_the_same_plugins_and_hooks(both: dict[str, tuple[Report, Report]], role: str) -> None:
    cold, ours = both[role]
    assert {"router_capture", "router_capture_probe", "sglang_cpu_engine"} <= set(cold["plugins"])
    assert cold["registered"] and set(cold["hooked_by"]) == set(HOOKED)
    for what in ("plugins", "registered", "hooked_by", "hooks_imported"):
        assert ours[what] == cold[what], what
    assert _but_its_port(ours["command"]) == _but_its_port(cold["command"])


@pytest.mark.parametrize("role", ROLES)
def test_each_process_has_the_same_environment(both: dict[str, tuple[Report, Report]], role: str) -> None:
    cold, ours = (
        {name: value for name, value in report["environment"].items() if name not in OF_A_START}
        for report in both[role]
    )
    assert len(cold) > 10
    assert ours == cold


@pytest.mark.parametrize("role", ROLES)
def test_each_process_has_imported_the_same(both: dict[str, tuple[Report, Report]], role: str) -> None:
    cold, ours = (set(report["modules"]) for report in both[role])
    was_forked = ["tests.forked_servers.keeper" in names for names in (cold, ours)]
    assert was_forked == [False, True], "has SGLang set what tests/forked_servers/environment.py does not know?"
    assert len(ours) > 1000
    # The other one may have had more work to do.
    assert {name for name in ours if name.partition(".")[0] != "tests"} <= cold
    assert len(cold - ours) < 50
