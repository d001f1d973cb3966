"""Without a flag the plugin is not there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpu_engines.sglang.server import Server
from router_replay.errors import DataError
from router_replay.masks import masks_from_meta_info
from sglang_router_capture import hooks
from tests.sglang_router_capture.probe import reports
from tests.sglang_router_capture.requests import generate, prompt

pytestmark = pytest.mark.timeout(900)


def _is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_no_process_of_a_server_without_flags_has_a_hook(plain_server: tuple[Server, Path]) -> None:
    for report in reports(plain_server[1]):
        assert len(report["hooked_by"]) == len(hooks.HOOKS)
        # SGLang's dependencies bring a plugin that hooks the command line, too: other modules may be there.
        modules = {module for found in report["hooked_by"].values() for module in found}
        assert not {module for module in modules if module.startswith("sglang_router_capture")}
        assert not report["hooks_imported"]


def test_a_server_without_flags_loads_no_ledger(plain_server: tuple[Server, Path]) -> None:
    for report in reports(plain_server[1]):
        # The entry point was here, so that what is missing below was not loaded by it.
        assert "sglang_router_capture.plugin" in report["loaded"]
        assert [name for name in report["loaded"] if _is_of(name, "router_replay.upstream")] == []
        assert not {"sglang_router_capture.ledger", "sglang_router_capture.seam_check"} & {*report["loaded"]}


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
            any(_is_of(module, "sglang_router_capture.hooks") for module in modules)
            for modules in report["hooked_by"].values()
        )


def test_a_request_for_routes_to_a_server_that_records_none(plain_server: tuple[Server, Path]) -> None:
    server, _ = plain_server
    answer = generate(server, prompt(1, 12), 3)
    with pytest.raises(DataError, match="--enable-router-capture"):
        masks_from_meta_info(answer["meta_info"])
