"""Invariant: remove() leaves stock Megatron, in its numbers and in its objects."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.moe.router_replay import RouterReplay

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.errors import RouterReplayError
from tests.megatron_router_replay.batches import gradients

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture
def upstream_replays():
    """Megatron's own list of replay objects only ever grows; put it back."""
    before = list(RouterReplay.global_router_replay_instances)
    yield
    RouterReplay.global_router_replay_instances[:] = before


def _routers(model):
    return [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]


def _step(model, batch):
    logprobs = token_logprobs(model, batch.token_ids)
    logprobs.sum().backward()
    return logprobs.detach(), gradients(model)


@pytest.mark.parametrize("recompute", [{}, RECOMPUTE], ids=["plain", "recompute"])
def test_numbers_are_those_of_a_model_never_touched(build_model, batch, recompute):
    untouched, removed = build_model(**recompute), build_model(**recompute)
    with attach(removed) as replay, replay.microbatch(batch.masks, batch.layout):
        under_replay, _ = _step(removed, batch)
    removed.zero_grad(set_to_none=True)
    expected, expected_gradients = _step(untouched, batch)
    found, found_gradients = _step(removed, batch)
    assert not torch.equal(under_replay, expected)
    assert torch.equal(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(value, expected_gradients[name]) for name, value in found_gradients.items())


@pytest.mark.parametrize("megatron_replays_too", [False, True])
def test_objects_are_put_back(build_model, megatron_replays_too, upstream_replays):
    model = build_model(moe_enable_routing_replay=megatron_replays_too)
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    originals = [router.router_replay for router in _routers(model)]
    assert all(isinstance(original, RouterReplay) == megatron_replays_too for original in originals)
    forward = CheckpointFunction.__dict__["forward"]

    replay = attach(model, overlap_every=None)
    assert all(
        router.router_replay is not original for router, original in zip(_routers(model), originals, strict=True)
    )
    assert CheckpointFunction.__dict__["forward"] is not forward
    assert replay.attached
    replay.remove()
    replay.remove()

    assert not replay.attached
    assert all(router.router_replay is original for router, original in zip(_routers(model), originals, strict=True))
    assert CheckpointFunction.__dict__["forward"] is forward
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == modules


def test_checkpoint_patch_stays_while_another_replay_needs_it(build_model):
    forward = CheckpointFunction.__dict__["forward"]
    first, second = attach(build_model()), attach(build_model())
    first.remove()
    first.remove()
    assert CheckpointFunction.__dict__["forward"] is not forward
    second.remove()
    assert CheckpointFunction.__dict__["forward"] is forward


def test_an_error_in_the_block_still_removes(build_model):
    model = build_model()
    with pytest.raises(KeyboardInterrupt), attach(model):
        raise KeyboardInterrupt
    assert all(router.router_replay is None for router in _routers(model))
    with attach(model):
        pass


def test_a_removed_replay_refuses_to_bind(build_model, batch):
    replay = attach(build_model())
    replay.remove()
    for bind in (lambda: replay.microbatch(batch.masks, batch.layout), replay.off, replay.observe):
        with pytest.raises(RouterReplayError, match="was removed from its model: attach again"), bind():
            pass
