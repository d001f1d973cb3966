"""R2 in parallel layouts: a recorded step replayed is the native one, and its parts join to whole sequences' masks."""

from __future__ import annotations

import pytest
import torch

from router_replay.replay import join_parts
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import assert_same_step, joined
from tests.megatron_router_replay.parallel.data import microbatches
from tests.megatron_router_replay.parallel.replaying import recorded_step

CASES = (
    Case(pp=2, vpp=2, packed=True),
    Case(tp=2, dense=(0,), recompute="full"),
    Case(cp=2, packed=True),
    Case(pp=2, vpp=2, cp=2, mtp=1, dense=(0, 2), packed=True, recompute="full"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replay_of_recorded_routes_is_the_native_step(case, pools, run_step):
    ranks = pools[case.world_size].run(recorded_step, case)
    native = run_step(case.one_rank())
    assert_same_step(joined(case, [rank.step for rank in ranks]), native)
    for microbatch in microbatches(case):
        masks = join_parts([part for rank in ranks for part in rank.parts[microbatch.index]])
        for sequence, (one, token_ids) in enumerate(
            zip(masks, microbatch.layout.by_sequence(microbatch.layout.token_ids), strict=True)
        ):
            one.check_tokens(token_ids)
            assert one.valid.all() and one.num_tokens == len(token_ids)
            places = [microbatch.place(sequence, position) for position in range(len(token_ids))]
            for ordinal, layer in enumerate(case.moe_layers):
                dispatched = native.maps[layer, microbatch.index][places]
                found = torch.zeros_like(dispatched).scatter(1, one.indices()[:, ordinal].long(), True)
                assert torch.equal(found, dispatched)
