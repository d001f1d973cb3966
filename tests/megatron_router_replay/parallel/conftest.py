"""Ranks that live as long as the session, and what one rank computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import Step
from tests.megatron_router_replay.parallel.pool import RankPool

RunStep = Callable[..., Step]


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """Pools of 1, 2 and 4 ranks; each starts with its first case."""
    pools = {size: RankPool(size) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def run_step(pools: dict[int, RankPool]) -> RunStep:
    """Train one step of a case on its ranks, joined; steps of one rank are kept for the cases that follow."""
    from tests.megatron_router_replay.parallel import training
    from tests.megatron_router_replay.parallel.comparison import joined

    known: dict[tuple[Case, object], Step] = {}

    def run(case: Case, function: Callable[[Case], object] = training.native_step) -> Step:
        key = case, function
        if key in known:
            return known[key]
        step = joined(case, pools[case.world_size].run(function, case))
        if case == case.one_rank():
            known[key] = step
        return step

    return run
