"""Rollout replay in parallel layouts: losses, gradients and experts of one rank, and the experts recorded."""

from __future__ import annotations

import pytest

from tests.megatron_router_replay.parallel import training
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import TOLERANCE, assert_same_step, errors
from tests.megatron_router_replay.parallel.data import microbatches
from tests.megatron_router_replay.parallel.replaying import assert_recorded_experts, replayed_step

HYBRID = "*E*-*E*E"
ALL_AT_ONCE = {"dense": (0,), "packed": True, "recompute": "full"}

CASES = (
    Case(tp=2),
    Case(tp=2, **ALL_AT_ONCE),
    Case(tp=2, mtp=1),
    Case(tp=2, hybrid=HYBRID),
    Case(tp=2, recompute="selective"),
    Case(cp=2),
    Case(cp=2, packed=True),
    Case(cp=2, **ALL_AT_ONCE),
    Case(cp=2, context_order="contiguous"),
    Case(cp=2, context_order="contiguous", packed=True),
    Case(cp=2, context_order="contiguous", **ALL_AT_ONCE),
    Case(tp=2, cp=2),
    Case(tp=2, cp=2, **ALL_AT_ONCE),
    Case(ep=2),
    Case(ep=2, dispatcher="alltoall"),
    Case(ep=2, **ALL_AT_ONCE),
    Case(ep=2, dispatcher="alltoall", **ALL_AT_ONCE),
    Case(tp=2, ep=2),
    Case(tp=2, ep=2, dispatcher="alltoall"),
    Case(tp=2, ep=2, etp=1, dispatcher="alltoall", **ALL_AT_ONCE),
    Case(pp=2),
    Case(pp=2, first=3),
    Case(pp=2, **ALL_AT_ONCE),
    Case(pp=2, vpp=2),
    Case(pp=2, vpp=2, dense=(0, 2), packed=True, recompute="full"),
    Case(pp=2, vpp=2, recompute="selective"),
    Case(pp=2, vpp=2, mtp=1),
    Case(pp=2, vpp=2, hybrid=HYBRID),
    Case(pp=2, vpp=2, num_layers=6, standalone=True),
    Case(pp=2, vpp=2, num_layers=2, standalone=True),
    Case(pp=2, vpp=2, stages="Et|tt|t|L"),
    Case(pp=2, ep=2),
    Case(pp=2, ep=2, dispatcher="alltoall"),
    Case(pp=2, ep=2, score="sigmoid", dense=(1,), packed=True, recompute="full"),
    Case(tp=2, pp=2, vpp=2, recompute="selective"),
    Case(pp=2, vpp=2, cp=2),
    Case(pp=2, vpp=2, cp=2, dense=(0, 2), packed=True, recompute="full"),
    Case(pp=2, vpp=2, cp=2, mtp=1, dense=(0, 2), packed=True, recompute="full"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replayed_step_is_that_of_one_rank(case, run_step):
    found = run_step(case, replayed_step)
    assert_recorded_experts(case, found)
    read = [each.is_read() for each in microbatches(case)]
    assert_same_step(found, run_step(case.one_rank(), replayed_step), read)


def test_crossed_pipeline_messages_are_seen_though_every_expert_is_right(run_step):
    """Megatron's default messages of interleaved stages reach the wrong microbatch on gloo."""
    case = Case(pp=2, vpp=2, config=(("overlap_p2p_comm", False), ("batch_p2p_comm", True)))
    found, expected = run_step(case, replayed_step), run_step(case.one_rank(), replayed_step)
    assert_recorded_experts(case, found)
    wrong = [name for name, error in errors(found, expected).items() if error > 1e5 * TOLERANCE]
    assert "losses" in wrong and len(wrong) > len(expected.gradients) / 2


@pytest.mark.parametrize("case", sorted({case.one_rank() for case in CASES}, key=str), ids=str)
def test_masks_are_not_what_the_model_would_choose(case, run_step):
    native, replayed = run_step(case, training.native_step), run_step(case, replayed_step)
    for layer in case.moe_layers:
        different = [(native.maps[layer, index] != replayed.maps[layer, index]).any(-1) for index in range(4)]
        assert sum(int(each.sum()) for each in different) > 40
