"""Two minutes of the soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.small_model import CHECKPOINT
from tests.soak.run import Setup, Target, soak

pytestmark = pytest.mark.timeout(1500)


def test_everything_at_once(tmp_path: Path) -> None:
    # How much comes about in this time is a matter of the machine: KV that went through the host, storage and
    # retraction is what `make soak` waits for.
    target = Target(rows=12_000, distinct=4_000, host=300, storage=300, retracted=1_000, seconds=120)
    result = soak(CHECKPOINT, tmp_path, Setup(), target, seed=1)
    tally = result.tally
    assert tally.wrong.total() == 0, "\n".join(tally.faults[:3])
    assert tally.faults == []
    assert result.unexplained == 0, result.report()
    for origin in ("computed", "device"):
        assert tally.rows[origin] > 0, tally.report()
