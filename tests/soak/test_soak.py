"""Two minutes of the soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.small_model import CHECKPOINT
from tests.soak.run import Setup, Target, soak

pytestmark = pytest.mark.timeout(1500)


def test_everything_at_once(tmp_path: Path) -> None:
    # KV that went through the host and storage takes longer to come about: `make soak` waits for it, and
    # tests/sglang_router_capture/test_hicache.py brings it about.
    target = Target(rows=12_000, distinct=4_000, host=300, storage=300, retracted=1_000, seconds=120)
    result = soak(CHECKPOINT, tmp_path, Setup(), target, seed=1)
    tally = result.tally
    assert tally.wrong.total() == 0, "\n".join(tally.faults[:3])
    assert tally.faults == []
    assert result.unexplained == 0, result.report()
    for origin in ("computed", "device", "retracted"):
        assert tally.rows[origin] > 0, tally.report()
    assert tally.events["names given by the server"] > 0, tally.report()
