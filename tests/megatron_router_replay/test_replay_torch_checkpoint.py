"""Invariant: a recompute routes as its own forward pass did, whoever's checkpoint it is in."""

from __future__ import annotations

import pytest
import torch

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.errors import CallOrderError
from router_replay.replay.binding import current
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients, random_batch
from tests.megatron_router_replay.checkpoint_kinds import KINDS, ORDERS, forward

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def batches(geometry):
    # One shape for all: another microbatch's rows would fit, and be wrong.
    return [random_batch(geometry, (12, 9, 5), seed=seed) for seed in (21, 22, 23)]


@pytest.fixture(autouse=True)
def nothing_is_left_bound():
    yield
    assert dict(current().bindings) == {} and current().frames == ()


@pytest.fixture(scope="module")
def without_recompute():
    """Gradients by order of backward passes, which changes their sums."""
    return {}


def _train(model, batches, order):
    with attach(model, overlap_every=None) as replay:
        ORDERS[order](model, replay, batches)
    return gradients(model)


@pytest.mark.parametrize("order", ORDERS)
@kinds
def test_gradients_are_bitwise_those_without_recompute(build_model, batches, without_recompute, kind, order):
    if order not in without_recompute:
        without_recompute[order] = _train(build_model(), batches, order)
    plain = without_recompute[order]
    recomputed = _train(kind.build(build_model), batches, order)
    assert plain.keys() == recomputed.keys()
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


def _recomputes(model, loss, maps):
    """Maps dispatched in a loss's backward pass, by layer."""
    for seen in maps.values():
        seen.clear()
    loss.backward()
    assert all(seen for seen in maps.values())
    return {layer: list(seen) for layer, seen in maps.items()}


def _assert_own_rows(batch, maps):
    for layer, seen in maps.items():
        recorded = dict(batch.recorded(layer))
        for routing_map in seen:
            assert {place: experts_of(routing_map, place) for place in recorded} == recorded


@kinds
def test_backward_inside_another_block(build_model, batches, kind):
    first, second, _ = batches
    model = kind.build(build_model)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = forward(model, replay, first)
        with replay.microbatch(second.masks, second.layout):
            again = _recomputes(model, loss, maps)
            for seen in maps.values():
                seen.clear()
            token_logprobs(model, second.token_ids)
        _assert_own_rows(first, again)
        _assert_own_rows(second, maps)


def test_torch_utils_checkpoint_reentrant_backward_inside_another_block(build_model, batches):
    """As above, for the kind that was all wrong without a word."""
    test_backward_inside_another_block(build_model, batches, KINDS["torch.utils.checkpoint, reentrant"])


@kinds
def test_backward_outside_any_block(build_model, batches, kind):
    batch = batches[0]
    model = kind.build(build_model)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = forward(model, replay, batch)
        _assert_own_rows(batch, _recomputes(model, loss, maps))


@kinds
def test_native_choices_are_frozen_for_the_recompute(build_model, batches, kind):
    """Router weights change between forward and backward: native places still repeat the forward pass's choice."""
    batch = batches[0]
    model = kind.build(build_model)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = forward(model, replay, batch)
        before = {layer: seen[0] for layer, seen in maps.items()}
        for layer in maps:
            model.decoder.layers[layer].mlp.router.weight.data.neg_()
        again = _recomputes(model, loss, maps)
        for seen in maps.values():
            seen.clear()
        with replay.off(), torch.no_grad():
            token_logprobs(model, batch.token_ids)
    for layer, recomputed in again.items():
        assert all(torch.equal(before[layer], each) for each in recomputed)
        assert not torch.equal(before[layer][batch.native()], maps[layer][0][batch.native()])


@kinds
def test_observed_routes_are_of_the_forward_pass_alone(build_model, batches, kind):
    batch = batches[0]
    model = kind.build(build_model)
    with attach(model, overlap_every=None) as replay, replay.observe() as observed:
        forward(model, replay, batch).backward()
    for routes, length in zip(observed.indices(batch.layout), batch.lengths, strict=True):
        assert routes.shape == (length, 3, 4)


@pytest.mark.parametrize("name", list(KINDS)[:5])
def test_remove_between_forward_and_recompute_is_refused(build_model, batches, name):
    model = KINDS[name].build(build_model)
    replay = attach(model, overlap_every=None)
    loss = forward(model, replay, batches[0])
    replay.remove()
    with pytest.raises(CallOrderError, match=r"call remove\(\) after the backward pass"):
        loss.backward()


@pytest.mark.parametrize("name", list(KINDS)[:5])
def test_an_error_in_a_recompute_leaves_the_next_microbatch_right(build_model, batches, name):
    first, second, _ = batches
    model = KINDS[name].build(build_model)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = forward(model, replay, first)
        router = model.decoder.layers[2].mlp.router
        with replay.microbatch(second.masks, second.layout):
            stop = router.register_forward_pre_hook(_stop)
            with pytest.raises(KeyError):
                loss.backward()
            stop.remove()
            assert current().frames == () and len(current().bindings) == 1
            for seen in maps.values():
                seen.clear()
            token_logprobs(model, second.token_ids)
        _assert_own_rows(second, maps)


def _stop(module, args):
    raise KeyError("the recompute stops here")
