"""What replay leaves as it is in the router, and what it must not do there."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from cpu_engines.megatron.logprobs import forward_logits
from megatron_router_replay import attach
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, random_batch
from tests.no_waiting import RefuseWaiting


@pytest.mark.parametrize("codec", ["bitset", "ordered"])
def test_forward_never_waits_for_the_device(build_model, geometry, codec):
    model, batch = build_model(), random_batch(geometry, (12, 9, 5), seed=31, codec=codec)
    hidden = torch.randn(12, 3, 48, generator=torch.Generator().manual_seed(32))
    layer = model.decoder.layers[2]
    with attach(layer) as replay, replay.microbatch(batch.masks, batch.layout), RefuseWaiting():
        _, routing_map = layer.mlp.router(hidden)
    recorded = dict(batch.recorded(2))
    assert {place: experts_of(routing_map, place) for place in recorded} == recorded


def test_the_guard_against_waiting_does_see_a_wait():
    with pytest.raises(AssertionError, match="waits for the device"), RefuseWaiting():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="waits"), RefuseWaiting():
        torch.ones(3)[torch.tensor([True, False, True])]


def test_expert_bias_moves_native_choices_only_and_counts_the_replayed_map(build_model, batch):
    model = build_model(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    # Large enough to win every native choice.
    favoured = torch.tensor([5.0] * 4 + [0.0] * 12)
    for layer in batch.geometry.moe_layers:
        model.decoder.layers[layer].mlp.router.expert_bias.copy_(favoured)
    with (
        attach(model, overlap_every=None) as replay,
        dispatched_maps(model) as maps,
        replay.microbatch(batch.masks, batch.layout),
    ):
        forward_logits(model, batch.token_ids)
    for layer, (routing_map,) in maps.items():
        recorded = dict(batch.recorded(layer))
        assert {place: experts_of(routing_map, place) for place in recorded} == recorded
        assert all(experts_of(routing_map, place) == {0, 1, 2, 3} for place in batch.native())
        counted = model.decoder.layers[layer].mlp.router.local_tokens_per_expert
        assert torch.equal(counted, routing_map.sum(0).float())


def test_gates_are_the_scores_of_the_recorded_experts(build_model, batch):
    """Sigmoid router: g_i = sigmoid(s_i) / sum over the mask; the bias has no part in it."""
    model = build_model(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    router = model.decoder.layers[1].mlp.router
    router.expert_bias.copy_(torch.linspace(-1, 1, 16))
    hidden = torch.randn(12, 3, 48, generator=torch.Generator().manual_seed(33))
    with attach(model.decoder.layers[1]) as replay, replay.microbatch(batch.masks, batch.layout):
        probs, routing_map = router(hidden)
    scores = (hidden.reshape(-1, 48).double() @ router.weight.detach().double().T).sigmoid() * routing_map
    expected = scores / scores.sum(-1, keepdim=True)
    # Two float32 roundings per score and K = 4 terms in the sum.
    torch.testing.assert_close(probs.double(), expected, rtol=48 * 2.0**-23, atol=0)


def test_wrapped_bfloat16_model(build_model, batch):
    wrapped = build_model(dtype=torch.bfloat16, moe_router_dtype="fp32")
    model = Float16Module(wrapped.config, wrapped)
    with attach([model], overlap_every=None) as replay, dispatched_maps(wrapped) as maps:
        assert replay.layers == (1, 2, 3)
        with replay.microbatch(batch.masks, batch.layout):
            logits = forward_logits(model, batch.token_ids)
    assert logits.dtype == torch.float32
    for layer, (routing_map,) in maps.items():
        recorded = dict(batch.recorded(layer))
        assert {place: experts_of(routing_map, place) for place in recorded} == recorded
