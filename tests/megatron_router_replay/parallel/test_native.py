"""Megatron alone, in every layout: the harness is right, so that a difference with replay is the replay's."""

from __future__ import annotations

import pytest

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import assert_same_step

HYBRID = "*E*-*E*E"

CASES = (
    Case(tp=2),
    Case(tp=2, dense=(0,), packed=True, recompute="full"),
    Case(tp=2, mtp=1),
    Case(tp=2, hybrid=HYBRID),
    Case(tp=2, recompute="selective"),
    Case(cp=2),
    Case(cp=2, packed=True),
    Case(cp=2, context_order="contiguous"),
    Case(cp=2, context_order="contiguous", packed=True),
    Case(cp=2, dense=(0,), packed=True, recompute="full"),
    Case(cp=2, context_order="contiguous", dense=(0,), packed=True, recompute="full"),
    Case(cp=2, mtp=1),
    Case(cp=2, ep=2, dispatcher="alltoall"),
    Case(tp=2, cp=2),
    Case(tp=2, cp=2, dense=(0,), packed=True, recompute="full"),
    Case(ep=2),
    Case(ep=2, dispatcher="alltoall"),
    Case(ep=2, dispatcher="alltoall", dense=(0,), packed=True, recompute="full"),
    Case(tp=2, ep=2),
    Case(tp=2, ep=2, dispatcher="alltoall"),
    Case(tp=2, ep=2, etp=1),
    Case(tp=2, ep=2, etp=1, dispatcher="alltoall"),
    Case(tp=2, ep=2, etp=1, dispatcher="alltoall", dense=(0,), packed=True, recompute="full"),
    Case(pp=2),
    Case(pp=2, first=3),
    Case(pp=2, dense=(0,), packed=True, recompute="full"),
    Case(pp=2, vpp=2),
    Case(pp=2, vpp=2, dense=(0, 2), packed=True, recompute="full"),
    Case(pp=2, vpp=2, recompute="selective"),
    Case(pp=2, vpp=2, mtp=1),
    Case(pp=2, vpp=2, hybrid=HYBRID),
    Case(pp=2, vpp=2, num_layers=6, standalone=True),
    Case(pp=2, vpp=2, num_layers=2, standalone=True),
    Case(pp=2, vpp=2, stages="Et|tt|t|L"),
    Case(pp=2, vpp=2, mtp=1, stages="Et|tt|t|mL"),
    Case(pp=2, ep=2),
    Case(pp=2, ep=2, dispatcher="alltoall"),
    Case(pp=2, ep=2, score="sigmoid", dense=(1,), packed=True, recompute="full"),
    Case(tp=2, pp=2, vpp=2, recompute="selective"),
    Case(pp=2, vpp=2, cp=2),
    Case(pp=2, vpp=2, cp=2, dense=(0, 2), packed=True, recompute="full", mtp=1),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_step_is_that_of_one_rank(case, run_step):
    assert_same_step(run_step(case), run_step(case.one_rank()))
