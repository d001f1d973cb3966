"""What a trainer reads of replay, and what it may bind more than once: placements and recordings."""

from __future__ import annotations

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits
from megatron_router_replay import attach
from router_replay.errors import InputError
from tests.megatron_router_replay.batches import dispatched_maps
from tests.megatron_router_replay.own_routes import own_masks, wrong_rows


@pytest.fixture
def model(build_model):
    return build_model()


def test_every_so_many_passes_are_compared(model, batch):
    """Each third, beginning with the first, which has no gradients; and the first in training."""
    with attach(model, overlap_every=3) as replay:
        own = own_masks(model, replay, batch)
        replay.metrics()
        for number in range(1, 9):
            with torch.set_grad_enabled(number > 1), replay.microbatch(own, batch.layout):
                forward_logits(model, batch.token_ids)
            compared = "overlap/rollout" in replay.metrics()
            assert compared == (number in (1, 2, 4, 7)), number


def test_metrics_count_places_by_what_they_take(model, batch):
    fewer = [None, *batch.masks[1:]]
    with attach(model) as replay:
        for masks in (batch.masks, fewer):
            with torch.no_grad(), replay.microbatch(masks, batch.layout):
                forward_logits(model, batch.token_ids)
        metrics = replay.metrics()
        assert replay.metrics() == {}
    valid = [int(one.valid.sum()) for one in batch.masks]
    assert metrics["places/replayed"] == sum(valid) + sum(valid[1:])
    assert metrics["places/native (no routes)"] == 12
    invalid = [one.num_tokens - int(one.valid.sum()) for one in batch.masks]
    assert metrics["places/native (invalid)"] == sum(invalid) + sum(invalid[1:])
    assert metrics["places/padding"] == len(batch.unread()) + len(batch.unread()) - 1
    assert {f"overlap/rollout/layer {layer}" for layer in (1, 2, 3)} < metrics.keys()


def test_a_placement_is_bound_as_often_as_one_likes(model, batch):
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        placed = replay.place(batch.masks, batch.layout)
        for _ in range(3):
            with replay.microbatch(placed):
                forward_logits(model, batch.token_ids)
            assert wrong_rows(maps, batch) == 0
        with (
            pytest.raises(InputError, match="a placement has its layout already"),
            replay.microbatch(placed, batch.layout),
        ):
            raise AssertionError("bound")


def test_a_recording_is_replayed_to_the_last_bit(model, batch):
    """R2: routes of the old policy, with the policy's new weights."""
    with attach(model, overlap_every=1) as replay, dispatched_maps(model) as maps:
        with torch.no_grad(), replay.record(batch.layout) as recorded:
            old = forward_logits(model, batch.token_ids)
        with replay.microbatch(recorded.routes):
            again = forward_logits(model, batch.token_ids)
        assert torch.equal(old, again)
        assert replay.metrics()["overlap/recorded"] == 1
        for layer in maps:
            router = model.decoder.layers[layer].mlp.router
            router.weight.data += 0.05 * torch.randn_like(router.weight)
        with replay.microbatch(recorded.routes):
            forward_logits(model, batch.token_ids)
        drifted = replay.metrics()["overlap/recorded"]
        replay.check()
    assert all(torch.equal(first, each) for first, *rest in maps.values() for each in rest)
    assert 0.5 < drifted < 1
