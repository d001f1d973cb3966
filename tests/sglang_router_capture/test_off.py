"""Without a request for routes there are entry hooks, and nothing else of ours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpu_engines.sglang.server import Server
from router_replay.errors import DataError
from router_replay.masks import masks_from_meta_info
from sglang_router_capture import entry
from tests.sglang_router_capture.probe import HOOKED, reports
from tests.sglang_router_capture.requests import generate, prompt
from tests.sglang_router_capture.test_seams import ENTRY_MODULES

pytestmark = pytest.mark.timeout(900)


def _is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_a_server_without_flags_has_the_entry_hooks_alone(plain_server: tuple[Server, Path]) -> None:
    for report in reports(plain_server[1]):
        assert len(report["hooked_by"]) == len(HOOKED)
        # SGLang's dependencies bring a plugin that hooks the command line, too: other modules may be there.
        ours = {
            (path, module)
            for path, found in report["hooked_by"].items()
            for module in found
            if _is_of(module, "sglang_router_capture")
        }
        assert ours == {(path, "sglang_router_capture.entry") for path in entry.HOOKS}
        assert not report["hooks_imported"]


def test_a_server_without_flags_loads_no_more_of_us_than_these(plain_server: tuple[Server, Path]) -> None:
    """No ledger, no torch op, nothing of the scheduler."""
    for report in reports(plain_server[1]):
        assert set(report["loaded"]) == ENTRY_MODULES


@pytest.mark.parametrize("part", ["mismatch", "report", "run", "replay"])
def test_a_server_that_captures_loads_nothing_of_the_trainers(
    capture_server: Server, capture_reports: Path, part: str
) -> None:
    """Not after requests either, by which the recorder has loaded what it needs."""
    generate(capture_server, prompt(2, 12), 3)
    asked = time.time()
    # A report is written every two seconds.
    time.sleep(5)
    for report in reports(capture_reports):
        assert report["time"] > asked
        assert "router_replay.masks.masks" in report["loaded"]
        assert [name for name in report["loaded"] if _is_of(name, f"router_replay.{part}")] == []
        assert [name for name in report["loaded"] if _is_of(name, "megatron_router_replay")] == []
        assert [name for name in report["loaded"] if _is_of(name, "router_replay_cli")] == []


def test_every_process_of_a_server_with_the_flag_has_every_hook(capture_server: Server, capture_reports: Path) -> None:
    """The same probe sees them where they are."""
    for report in reports(capture_reports):
        assert report["hooks_imported"]
        assert all(
            any(
                _is_of(module, f"sglang_router_capture.{'entry' if path in entry.HOOKS else 'hooks'}")
                for module in found
            )
            for path, found in report["hooked_by"].items()
        )


def test_a_request_for_routes_to_a_server_that_records_none(plain_server: tuple[Server, Path]) -> None:
    server, _ = plain_server
    answer = generate(server, prompt(1, 12), 3)
    with pytest.raises(DataError, match="--enable-router-capture"):
        masks_from_meta_info(answer["meta_info"])
