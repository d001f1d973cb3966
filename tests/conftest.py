"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cpu_engines.sglang.server import Server
from examples.small_model import CHECKPOINT
from tests.sglang_router_capture.probe import probing
from tests.small_model import CAPTURE_FLAGS, serve


def pytest_configure() -> None:
    # The tensors of these tests are small: more threads only contend with each other.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The project's trained Qwen3-MoE: decoder layer 0 dense, five MoE layers of 32 experts, top-4."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def capture_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the probes in the processes of `capture_server` report."""
    return tmp_path_factory.mktemp("capture_probe")


@pytest.fixture(scope="session")
def capture_server(small_model: Path, capture_reports: Path) -> Iterator[Server]:
    """A server with capture on, in its default format; small chunks, and a pool that a few requests fill."""
    with serve(small_model, *CAPTURE_FLAGS, environment=probing(capture_reports)) as server:
        yield server
