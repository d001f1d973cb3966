"""Two minutes of the soak."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.small_model import CHECKPOINT
from tests.soak.answers import ORIGINS
from tests.soak.run import Setup, Target, soak

pytestmark = pytest.mark.timeout(1800)


def test_everything_at_once(tmp_path: Path) -> None:
    # Some two minutes where nothing else runs; a machine that is busy takes longer, and sees as much.
    target = Target(rows=25_000, distinct=5_000, host=300, storage=300, retracted=1_000, seconds=900)
    result = soak(CHECKPOINT, tmp_path, Setup(), target, seed=1)
    tally = result.tally
    assert tally.wrong.total() == 0, "\n".join(tally.faults[:3])
    assert tally.faults == []
    assert result.unexplained == 0, result.report()
    for origin in ORIGINS:
        assert tally.rows[origin] > 0, tally.report()
    assert tally.events["names given by the server"] > 0, tally.report()
