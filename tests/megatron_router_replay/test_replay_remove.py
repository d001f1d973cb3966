"""Invariant: remove() leaves stock Megatron, in its numbers and in its objects."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.moe.router_replay import RouterReplay

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.errors import RouterReplayError, SeamError
from tests.megatron_router_replay.batches import gradients
from tests.megatron_router_replay.checkpoint_kinds import KINDS

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


@pytest.mark.parametrize(
    "function", [CheckpointFunction, torch.utils.checkpoint.CheckpointFunction], ids=["Megatron's", "torch's"]
)
def test_what_others_wrapped_since_stays(build_model, batch, function, monkeypatch):
    """And works with replay below it, before and after remove(), and with the next replay."""
    kind = "torch.utils.checkpoint, reentrant"
    model = build_model(**RECOMPUTE) if function is CheckpointFunction else KINDS[kind].build(build_model)
    calls = []
    replay = attach(model)
    ours = function.forward

    @functools.wraps(ours)
    def theirs(ctx, run_function, *args):
        calls.append(run_function)
        return ours(ctx, run_function, *args)

    # monkeypatch puts ours back in the end, which then passes everything through.
    monkeypatch.setattr(function, "forward", staticmethod(theirs))
    for again in (True, False):
        calls.clear()
        with replay.microbatch(batch.masks, batch.layout):
            loss, _ = _step(model, batch)
        assert calls and function.forward is theirs
        replay.remove()
        assert function.forward is theirs
        if again:
            replay = attach(model)
            assert function.forward is theirs
    calls.clear()
    untouched, _ = _step(model, batch)
    assert calls and not torch.equal(untouched, loss)


def test_a_torch_that_does_not_fit_is_refused_and_nothing_is_touched(build_model, monkeypatch):
    model = build_model()
    forward = CheckpointFunction.__dict__["forward"]

    def other(ctx, function, *args):
        raise AssertionError("never called")

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "forward", staticmethod(other))
    with pytest.raises(SeamError, match=r"torch\.utils\.checkpoint\.CheckpointFunction\.forward: expected parameters"):
        attach(model)
    assert all(router.router_replay is None for router in _routers(model))
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
