"""What the tests of both engines share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_engines.sglang.server import Server
from tests.sglang_router_capture.underway import control


@pytest.fixture(scope="module")
def trained_server(capture_server: Server, small_model: Path) -> Iterator[Server]:
    """A server into which a test loads weights; its own are put back at the end."""
    yield capture_server
    control(capture_server, "/update_weights_from_disk", model_path=str(small_model), weight_version="default")
