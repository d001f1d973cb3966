"""The trainer's tests and these run the same layers on the same random checkpoint."""

from collections.abc import Iterator

import pytest

from tests.cpu_engines.megatron.ranks import Ranks
from tests.megatron_router_replay.conftest import batch, build_model, checkpoint, geometry, megatron

__all__ = ["batch", "build_model", "checkpoint", "geometry", "megatron"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two ranks, which start at the first call and end with their file of tests."""
    both = Ranks()
    yield both
    both.stop()
