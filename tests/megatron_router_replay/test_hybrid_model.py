"""HybridModel: rows are matched by ordinal among MoE layers, whatever else has a layer number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from megatron_router_replay.live_model import live_layers
from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.geometry import RoutingGeometry
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, random_batch
from tests.megatron_router_replay.small_hybrid import hybrid
from tests.megatron_router_replay.stages import pipeline_rank

# Dense first layer, three MoE layers: routers have Megatron's numbers 4, 6 and 8.
PATTERN = "*-*E*E*E"
QWEN = RoutingGeometry(num_layers=4, moe_layers=(1, 2, 3), num_experts=16, top_k=4)


def _numbers(pattern: str, **arguments) -> dict[int, int]:
    """Decoder layer of the masks: Megatron's layer number."""
    _, routers = live_layers([hybrid(pattern, **arguments)])
    return {layer: router.layer_number for layer, router in routers[0].items()}


def test_routers_are_matched_by_ordinal():
    model = hybrid(PATTERN)
    batch = random_batch(QWEN, lengths=(12, 9, 5), seed=1)
    with attach(model, overlap_every=None) as replay:
        assert replay.geometry == QWEN
        assert replay.layers == (1, 2, 3)
        with dispatched_maps(model) as maps, replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids).sum().backward()
    assert sorted(maps) == [3, 5, 7]
    for layer, position in ((1, 3), (2, 5), (3, 7)):
        assert len(maps[position]) == 1
        recorded = dict(batch.recorded(layer))
        assert len(recorded) > 10
        assert {place: experts_of(maps[position][0], place) for place in recorded} == recorded
    assert all(model.decoder.layers[position].mlp.router.weight.grad.abs().max() > 0 for position in (3, 5, 7))


@pytest.mark.parametrize(
    ("pattern", "num_layers", "moe_layers"),
    [
        (PATTERN, 4, (1, 2, 3)),
        ("*E*E", 2, (0, 1)),
        # Two mixers in a row: every layer is one of the rollout's, as Nemotron-H counts them.
        ("**E-*E", 6, (2, 5)),
        ("E*E", 3, (0, 2)),
        ("*E|*E|*-|*E", 4, (0, 1, 3)),
    ],
)
def test_geometry_without_a_rollout(pattern, num_layers, moe_layers):
    geometry, routers = live_layers([hybrid(pattern)])
    assert geometry == RoutingGeometry(num_layers, moe_layers, num_experts=16, top_k=4)
    # All segments of a pattern with stages are this one rank's only where there is one.
    if "|" not in pattern:
        assert tuple(routers[0]) == moe_layers


def test_the_rollouts_way_of_counting_wins():
    nemotron = RoutingGeometry(num_layers=8, moe_layers=(3, 5, 7), num_experts=16, top_k=4)
    batch = random_batch(nemotron, lengths=(6, 4), seed=2)
    model = hybrid(PATTERN)
    with attach(model, geometry=nemotron) as replay:
        assert replay.geometry == nemotron
        assert replay.layers == (3, 5, 7)
        with dispatched_maps(model) as maps, replay.microbatch(batch.masks, batch.layout):
            token_logprobs(model, batch.token_ids)
    recorded = dict(batch.recorded(5))
    assert {place: experts_of(maps[5][0], place) for place in recorded} == recorded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layers": (2, 3)}, "the rollout has 2 MoE layers, this HybridModel has 3, by its hybrid_layer_pattern"),
        ({"num_experts": 32}, "the rollout has 32 experts, this HybridModel has 16"),
        ({"top_k": 2}, r"the rollout has 2 experts per token \(top-k\), this HybridModel has 4"),
    ],
)
def test_another_rollout_is_refused(change, message):
    with pytest.raises(PairingError, match=message):
        attach(hybrid(PATTERN), geometry=replace(QWEN, **change))


@pytest.mark.parametrize(
    ("pattern", "config", "first"),
    [
        ("*-*E|*E*E", {}, {1: 4}),
        ("*-|*E*E*E", {}, {}),
        ("*-*E*E*E", {}, {1: 4}),
        ("*-*E*E*E", {"num_layers_in_first_pipeline_stage": 7}, {1: 4, 2: 6}),
    ],
    ids=["halves", "a stage without experts", "split by Megatron", "uneven, split by Megatron"],
)
def test_stages_have_the_whole_models_layers(pattern, config, first):
    whole = _numbers(PATTERN)
    assert whole == {1: 4, 2: 6, 3: 8}
    stages = []
    for rank in range(2):
        with pipeline_rank(rank, 2) as groups:
            settings = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, **config}
            ends = {"pre_process": rank == 0, "post_process": rank == 1}
            model = hybrid(pattern, config=settings, pg_collection=groups, **ends)
            geometry, (routers,) = live_layers([model])
            with attach(model, overlap_every=None) as replay:
                assert replay.layers == tuple(routers)
        assert geometry == QWEN
        stages.append({layer: router.layer_number for layer, router in routers.items()})
    assert stages == [first, {layer: number for layer, number in whole.items() if layer not in first}]


def test_interleaved_chunks_are_told_apart():
    """Two ranks with two chunks each: rank 0 holds segments 0 and 2."""
    held = []
    for rank in range(2):
        with pipeline_rank(rank, 2, chunks=2) as groups:
            config = {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_dtype": torch.float32,
            }
            chunks = [
                hybrid(
                    "*-|*E|*E|*E",
                    config=config,
                    pg_collection=groups,
                    vp_stage=stage,
                    pre_process=(rank, stage) == (0, 0),
                    post_process=(rank, stage) == (1, 1),
                )
                for stage in range(2)
            ]
            geometry, routers = live_layers(chunks)
        assert geometry == QWEN
        held.append([{layer: router.layer_number for layer, router in of_chunk.items()} for of_chunk in routers])
    assert held == [[{}, {2: 6}], [{1: 4}, {3: 8}]]


def test_mtp_routers_are_left_alone():
    """They are numbered from 1 and do not say that they are MTP's."""
    model = hybrid("*-*E/*E")
    mtp = [module for name, module in model.named_modules() if name.startswith("mtp.") and name.endswith("router")]
    assert [(router.layer_number, router.is_mtp_layer) for router in mtp] == [(2, False)]
    geometry, (routers,) = live_layers([model])
    assert geometry.moe_layers == (1,)
    assert [router.layer_number for router in routers.values()] == [4]
    with attach(model):
        assert mtp[0].router_replay is None


def test_dense_patterns_and_other_live_layers_are_refused():
    with pytest.raises(UnsupportedError, match=r"none of this model's 2 decoder layers routes .* hybrid_layer_pattern"):
        attach(hybrid("*-*-"))
    model = hybrid(PATTERN)
    model.hybrid_layer_pattern = "*E*E*E*E"
    with pytest.raises(PairingError, match=r"decoder layers \[1\] are dense in this model \(hybrid_layer_pattern\)"):
        attach(model, overlap_every=None)
    with pytest.raises(InputError, match=r"chunk 0 is of a model .*\[3, 5, 7\].*chunk 1 of one with \[1, 3\]"):
        attach([hybrid(PATTERN), hybrid("*E*E")])
