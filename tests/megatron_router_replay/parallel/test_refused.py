"""What Megatron-Core itself refuses of the parallel matrix, with its own words."""

from __future__ import annotations

import pytest

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.training import refusal

REFUSED = (
    (Case(tp=2, config=(("sequence_parallel", False),)), "without also enabling sequence parallelism"),
    (Case(vpp=2), "pipeline-model-parallel size should be greater than 1 with interleaved schedule"),
    (Case(pp=2, num_layers=3), "num_layers=3 should be divisible by"),
    (Case(pp=2, vpp=2, num_layers=6), "should be divisible by vp_size 2"),
    (Case(pp=2, vpp=2, first=1), "must be divisible by virtual pipeline"),
    (Case(pp=2, first=3, standalone=True), "cannot beset at the same time with account_for_embedding"),
    (Case(pp=2, first=1, stages="Et|tttL"), "cannot be set with other pipeline layout arguments"),
    (Case(pp=2, stages="Et|ttL"), "must match num_layers"),
    (Case(pp=2, vpp=2, mtp=1, stages="Ett|ttm||L"), "Currently we restrict that the MTP should be always in the last"),
    (Case(pp=2, vpp=2, num_microbatches=3), "The remainder of M (the total micro-batches) divided by N"),
    (Case(ep=2, config=(("variable_seq_lengths", True),)), "does not support variable sequence length"),
    (Case(pp=2, hybrid="*E*-*E*E", first=3), "Cannot specify num_layers_in_first_pipeline_stage"),
)


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=[str(case) for case, _ in REFUSED])
def test_megatron_refuses(case, words, pools):
    for said in pools[max(case.world_size, 2)].run(refusal, case):
        assert words in said
