"""What becomes of a pool whose ranks fail."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.pool import RankError, RankPool
from tests.megatron_router_replay.parallel.replaying import replayed_step


def number(offset):
    dist.barrier()
    return dist.get_rank() + offset


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("this rank's own words")
    dist.barrier()


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def threads():
    return len(os.listdir("/proc/self/task"))


def test_steps_leave_no_process_group(pools):
    """Each group has threads that wake all the time, and a session has hundreds of groups."""
    counts = []
    for _ in range(2):
        for case in (Case(pp=2), Case(pp=2, vpp=2, mtp=1, packed=True, recompute="full"), Case(ep=2)):
            pools[2].run(replayed_step, case)
        counts.append(pools[2].run(threads))
    # Megatron's log of losses of multi-token prediction keeps the last group that it was given.
    assert counts[0] == counts[1]


def test_every_rank_answers_and_serves_again(pools):
    assert pools[2].run(number, 10) == [10, 11]
    assert pools[2].run(number, 20) == [20, 21]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fail_on, [r"rank 1 of 2: Traceback", r"in fail_on", r"ValueError: this rank's own words"]),
        (hang_on, [r"rank 0 of 2: answered", r"rank 1 of 2: no answer", r"in hang_on"]),
        (die_on, [r"rank 1 of 2: the process ended with 3"]),
    ],
)
def test_a_failed_rank_is_reported_at_once_and_the_pool_starts_anew(function, words):
    pool = RankPool(2)
    try:
        assert pool.run(number, 0) == [0, 1]
        start = time.monotonic()
        with pytest.raises(RankError) as caught:
            pool.run(function, 1, timeout=7.0)
        # The other rank waits in a barrier, and would for half an hour.
        assert time.monotonic() - start < 15
        for word in words:
            assert word in str(caught.value)
        assert pool.run(number, 5) == [5, 6]
    finally:
        pool.close()
