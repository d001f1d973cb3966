"""Models of transformers on the CPU, one thread each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of small matrices are then in one order whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_is_left_bound() -> Iterator[None]:
    from router_replay.replay.binding import current

    yield
    assert dict(current().bindings) == {} and current().frames == ()
