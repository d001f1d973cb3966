"""Without a flag the plugin is not there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpu_engines.sglang.server import Server
from routing_masks import ContainerError, masks_from_meta_info
from tests.engine.conftest import probe_reports
from tests.engine.requests import generate, prompt

pytestmark = pytest.mark.timeout(900)


def test_no_process_of_a_server_without_flags_has_a_hook(plain_server: tuple[Server, Path]) -> None:
    _, folder = plain_server
    deadline = time.monotonic() + 60
    # The main process, the scheduler and the detokenizer.
    while len(reports := probe_reports(folder)) < 3 and time.monotonic() < deadline:
        time.sleep(1)
    assert len(reports) >= 3
    for report in reports:
        assert report["wrapped"] == []
        assert not report["hooks_imported"]


def test_a_request_for_routes_to_a_server_that_records_none(plain_server: tuple[Server, Path]) -> None:
    server, _ = plain_server
    answer = generate(server, prompt(1, 12), 3)
    with pytest.raises(ContainerError, match="--enable-router-capture"):
        masks_from_meta_info(answer["meta_info"])
