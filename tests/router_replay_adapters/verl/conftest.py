"""Ranks whose Megatron verl may patch, since nobody else uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_router_replay.parallel.pool import RankPool
from tests.router_replay_adapters.verl.rollout import agent_loop_worker


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    """No Megatron in the tests' own process: ranks have it."""


@pytest.fixture(scope="session")
def patched() -> Iterator[dict[int, RankPool]]:
    """Pools of 1 and 2 ranks."""
    pools = {size: RankPool(size) for size in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def unpatched() -> Iterator[RankPool]:
    """One rank that verl leaves alone."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def engines() -> Iterator[dict[int, RankPool]]:
    """Pools of 1 and 2 ranks with verl's engine, whose own replay is off: it leaves Megatron alone."""
    from tests.router_replay_adapters.verl.engine_pass import load

    pools = {size: RankPool(size) for size in (1, 2)}
    for pool in pools.values():
        pool.run(load, timeout=300)
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def worker(small_model: Path) -> Any:
    """Worker of verl's agent loop."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    return agent_loop_worker(AgentLoopWorker, small_model)
